"""How much memory this process can still take."""

from __future__ import annotations

import os
from pathlib import Path

#: Left to the system and other processes when deciding whether something fits.
RESERVE_BYTES = 256 << 20


def available_memory(root: Path = Path("/")) -> int:
    """Return bytes this process can still take: of the machine, and of its control group.

    On a Jetson the GPU's memory is this memory: it is counted once.
    """
    limits = [_meminfo(root)]
    group = root / "sys/fs/cgroup"
    most, used = (_number(group / f"memory.{name}") for name in ("max", "current"))
    if most is not None and used is not None:
        # File pages are given back when memory is short.
        limits.append(most - used + _reclaimable(group / "memory.stat"))
    return min(limits)


def _meminfo(root: Path) -> int:
    """Return MemAvailable in bytes, or physical memory where /proc is absent."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        # macOS does not even know of free ones.
        known = [name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in os.sysconf_names]
        return os.sysconf(known[0]) * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _reclaimable(path: Path) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split() for line in lines)
    return int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))
