"""Freed blocks go back to the system, so that the memory plan can count on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Frees a block of 24 MB, which raises glibc's threshold, then one below blocks still in use.
CHILD = """
import ctypes, sys
import numpy as np
from internvl_edge.runtime.backends import heap

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]

def held():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

def block(size):
    address = library.malloc(size)
    ctypes.memset(address, 1, size)
    return address

if sys.argv[1] != "glibc":
    with getattr(heap, sys.argv[1])():
        library.free(block(24 << 20))
library.free(block(24 << 20))
before = held()
large = block(20 << 20)
above = [block(64 << 10) for _ in range(8)]
library.free(large)
print(held() - before)
"""


def kept(setting: str) -> int:
    """Bytes that stay in the process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, setting], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("setting", ["large_blocks_returned", "large_blocks_reused"])
def test_large_blocks_are_returned(setting: str) -> None:
    if kept("glibc") < 20 << 20:
        pytest.skip("this C library keeps no freed blocks")
    assert kept(setting) < 2 << 20
