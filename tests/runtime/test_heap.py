"""Memory that nothing uses goes back to the system."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

#: Pages between what stays in use are free, and glibc keeps them.
SCRIPT = """
from internvl_edge.runtime.heap import give_back
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) >> 10
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


def test_free_pages_between_used_ones_are_given_back() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library has no malloc_trim: it is not glibc")
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=settings
    )
    before, after = map(int, done.stdout.split())
    assert before < 8 < 56 < after
