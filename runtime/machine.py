"""What this machine is, as far as stored results depend on it."""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from pathlib import Path

import numpy as np

from internvl_edge.runtime.ort import load_onnxruntime

#: Beginnings of the CPU flags that choose among ONNX Runtime's kernels.
_KERNEL_FLAGS = ("amx", "asimd", "avx", "bf16", "fma", "f16c", "i8mm", "sse", "sve")


def machine_key() -> str:
    """Name of what packed weights depend on: ONNX Runtime's version and the CPU's features."""
    digest = hashlib.sha256(" ".join(cpu_flags()).encode()).hexdigest()
    return f"onnxruntime-{load_onnxruntime().__version__}-{platform.machine()}-{digest[:12]}"


def cpu_flags() -> list[str]:
    """Features of the first CPU that matter, sorted; its name where the system lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return sorted({flag for flag in value.split() if flag.startswith(_KERNEL_FLAGS)})
    return [platform.processor() or platform.machine()]


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Features that this process can use, by NumPy's names, as the CPU itself reports them.

    Under an emulator /proc/cpuinfo shows the host's, so that `cpu_flags` may name more.
    """
    core = getattr(np, "_core", None) or np.core  # NumPy 1 has the latter
    features: dict[str, bool] = core._multiarray_umath.__cpu_features__
    return sorted(name for name, there in features.items() if there)
