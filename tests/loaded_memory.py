"""What loading a bundle takes of a process's own memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Anonymous bytes in use once the bundle is loaded, beyond those before: not what glibc keeps free.
LOADED = """
import ctypes, sys
from internvl_edge.runtime.backends.sessions import CpuGraphs
from internvl_edge.bundle.manifest import file_entry, open_bundle
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
bundle = open_bundle(sys.argv[1], verify="size")
import onnxruntime
before = anonymous()
graphs = CpuGraphs(bundle, 1, one_at_a_time=False)
if hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).malloc_trim(0)
print(anonymous() - before)
"""


def anonymous_bytes(bundle: Path) -> int:
    """Bytes that the sessions of a bundle hold, in a process of its own.

    With one heap for all threads: of others `malloc_trim` leaves what lies free at their ends.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(bundle)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    return int(done.stdout)
