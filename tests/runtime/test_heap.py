"""Memory that nothing uses goes back to the system."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

ANONYMOUS = """
from internvl_edge.runtime.heap import give_back
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024
"""
#: Pages between what stays in use are free, and glibc keeps them.
BETWEEN = """
blocks, kept = [], []
for _ in range(64):
    blocks.append(b"x" * (1 << 20))
    kept.append(b"x" * 100_000)
full = anonymous()
blocks.clear()
held = anonymous()
give_back()
print(full - held, full - anonymous())
"""
#: What could still be given back after each of some answers about pictures: the most of them.
ANSWERS = """
from internvl_edge.bundle.extras import example_room
from internvl_edge.examples.tiny_ocr.data import HELD_OUT, scene
from internvl_edge.runtime import InternVL
model, most = InternVL.load(example_room() / "bundle", device="cpu", threads=1), 0.0
for seed in range(4):
    model.generate("Read all lines.", [scene(HELD_OUT + seed).image], max_new_tokens=1)
    held = anonymous()
    give_back()
    most = max(most, held - anonymous())
print(most)
"""


def printed(script: str, **settings: str) -> list[float]:
    """Numbers that a script of a process of its own prints, in MiB."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library has no malloc_trim: it is not glibc")
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS + script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | settings,
    )
    return [float(number) for number in done.stdout.split()]


def test_free_pages_between_used_ones_are_given_back() -> None:
    before, after = printed(BETWEEN, MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert before < 8 < 56 < after


def test_answers_leave_little_that_could_be() -> None:
    """The passes over tiles and prompts took it: 8 MiB where they do not give it back."""
    (most,) = printed(ANSWERS)
    assert most < 3
