"""Threads of the vision graph give way to tokens, and no other thread does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, time
import numpy as np
from contextlib import suppress
from internvl_edge.runtime import InternVL

def nice(wanted):
    # One that has ended, and been waited for, may still be on its way out of the kernel.
    deadline = time.monotonic() + 20
    while (found := nice_now()) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return found

def nice_now():
    found = []
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # gone meanwhile
            found.append(os.getpriority(os.PRIO_PROCESS, int(task)) - start)
    return sorted(one for one in found if one)

start = os.getpriority(os.PRIO_PROCESS, 0)
loaded, answered = json.loads(sys.argv[3])
model = InternVL.load(sys.argv[1], device="cpu", threads=3, low_memory=sys.argv[2] == "low")
loaded = nice(loaded)
asked = {"prompt": "What?", "images": [np.zeros((60, 80, 3), np.uint8)], "max_new_tokens": 3}
model.generate_batch([asked])
print(json.dumps([loaded, nice(answered), os.getpriority(os.PRIO_PROCESS, 0) - start]))
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
    wanted = json.dumps([loaded, answered])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(golden_bundle), memory, wanted],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [loaded, answered, 0]
