"""What a figure was measured on: processor, clocks, memory, load, versions, the command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("internvl-edge", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")
#: Seconds `nvpmodel -q` may take.
PATIENCE = 5
#: Ratio of read bandwidths from which on a machine was not in the same state: a choice. A virtual
#: machine with busy neighbours showed 1.4 to 1.6 from round to round.
MOST_DRIFT = 1.15


def describe_machine(threads: int, root: Path = Path("/")) -> dict[str, Any]:
    """Plain values, ready for JSON; what the platform does not tell is None.

    Args:
        threads: the run's.
        root: of the file system, for the tests.
    """
    cpu0 = root / "sys/devices/system/cpu/cpu0/cpufreq"
    frequency = _text(cpu0 / "scaling_cur_freq")
    return {
        "cpu": _cpu_name(root),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "frequency_mhz": float(frequency) / 1e3 if frequency else _cpuinfo_mhz(root),
        "governor": _text(cpu0 / "scaling_governor"),
        "power_mode": _power_mode(root),
        "load": _load(root),
        "cache_bytes": _cache_bytes(root),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": installed_versions(LIBRARIES),
        "command": command_line(sys.argv),
    }


def command_line(arguments: Sequence[str]) -> str:
    """Return the command as typed, with whole paths cut to their last name: results are shared."""
    # A path stands alone or behind "--option=".
    return shlex.join(
        re.sub(r"^(--[\w-]+=)?/(?:.*/(?!$))?", r"\1", a, flags=re.S) for a in arguments
    )


def busy_note(machine: dict[str, Any]) -> str | None:
    """A warning when other work was waiting for the processor as the run began."""
    load, cores = machine["load"], machine["cores"]
    if load is None or load < 0.25 * cores:
        return None
    return f"the machine was busy when this began (load {load:.1f} on {cores} cores)"


def cache_note(machine: dict[str, Any], name: str, weight_bytes: int) -> str | None:
    """A warning when a model is too small for the memory's bandwidth to bound it."""
    cache = machine["cache_bytes"]
    if cache is None or weight_bytes > cache:
        return None
    return (
        f"{name}: {weight_bytes / 1e6:.1f} MB of weights fit the {cache / 1e6:.0f} MB of cache,"
        " so that the memory's bandwidth is no bound"
    )


def _cache_bytes(root: Path) -> int | None:
    """The last-level cache of the first core."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if (found := re.fullmatch(r"(\d+)([KM])", _text(path) or "")) is not None:
            sizes.append(int(found[1]) << (10 if found[2] == "K" else 20))
    return max(sizes, default=None)


def _cpu_name(root: Path) -> str:
    info = _text(root / "proc/cpuinfo") or ""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    board = _text(root / "proc/device-tree/model")
    return found[1].strip() if found else (board or "").strip("\0") or platform.machine()


def _cpuinfo_mhz(root: Path) -> float | None:
    info = _text(root / "proc/cpuinfo") or ""
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)", info, re.MULTILINE)
    return float(found[1]) if found else None


def _load(root: Path) -> float | None:
    text = _text(root / "proc/loadavg")
    return float(text.split()[0]) if text else None


def _power_mode(root: Path) -> str | None:
    """Jetson's nvpmodel, else the firmware's platform profile."""
    if (tool := shutil.which("nvpmodel")) is not None:
        try:
            answer = subprocess.run(
                [tool, "-q"], capture_output=True, encoding="utf-8", timeout=PATIENCE, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return " ".join(answer.stdout.split())
    return _text(root / "sys/firmware/acpi/platform_profile")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
