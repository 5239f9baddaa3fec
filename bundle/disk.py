"""Sizes for people, and what a full disk is called."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from internvl_edge.bundle.quoting import named, reason

#: Errors of a disk, quota or file that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 1 << 22
_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def size_text(nbytes: int) -> str:
    """Format a size in decimal units: `1.3 GB`, `12.0 MB`, `512 bytes`."""
    for unit, size in _UNITS:
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"


def free_bytes(path: Path) -> int:
    """Return what is free on the disk that holds a path, or will hold it.

    Raises:
        OSError: nothing above the path can be looked at.
    """
    existing = Path(os.path.abspath(path))
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


def is_full(error: OSError) -> bool:
    """Return whether an error says that there is no room."""
    return error.errno in FULL


def check_room(path: Path, nbytes: int) -> None:
    """Write so many bytes to a file, as a library without a code for full disks would have.

    Raises:
        OSError: they do not fit: disk, quota or limit.
    """
    with path.open("wb") as stream:
        for start in range(0, nbytes, _BLOCK):
            stream.write(bytes(min(_BLOCK, nbytes - start)))


def full_disk(error: OSError, folder: Path) -> str:
    """Describe a full disk: the path that was written, the reason, and what is free there.

    Args:
        folder: what was being written, where the error names no path.
    """
    told = error.filename2 or error.filename  # of a copy, the second is written
    path = folder if told is None else Path(os.fsdecode(told))
    try:
        left = f"{size_text(free_bytes(path))} free"
    except OSError:  # the disk is gone altogether
        left = "nothing can be read there"
    return f"no space left while writing {named(path)}: {reason(error)}, {left}"
