"""Threads of the vision graph give way to tokens, and no other thread does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import numpy as np
from internvl_edge.runtime import InternVL

def nice():
    tasks = os.listdir("/proc/self/task")
    return sorted(os.getpriority(os.PRIO_PROCESS, int(task)) - start for task in tasks)

start = os.getpriority(os.PRIO_PROCESS, 0)
model = InternVL.load(sys.argv[1], device="cpu", threads=3, low_memory=sys.argv[2] == "low")
loaded = nice()
asked = {"prompt": "What?", "images": [np.zeros((60, 80, 3), np.uint8)], "max_new_tokens": 3}
model.generate_batch([asked])
print(json.dumps([loaded, nice(), os.getpriority(os.PRIO_PROCESS, 0) - start]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread is Linux's")
@pytest.mark.parametrize(
    ("memory", "loaded", "answered"),
    [("all", [5, 5], [5, 5, 5]), ("low", [], [])],
)
def test_the_vision_graphs_threads_and_the_lane(
    golden_bundle: Path, memory: str, loaded: list[int], answered: list[int]
) -> None:
    """Two beside the caller in each graph's pool, and the lane's own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(golden_bundle), memory],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, process = json.loads(done.stdout)
    assert [one for one in before if one] == loaded
    assert [one for one in after if one] == answered
    assert process == 0
    assert before.count(0) >= 1
