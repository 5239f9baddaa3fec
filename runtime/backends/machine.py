"""What this machine is, as far as stored results depend on it."""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from pathlib import Path

from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime.backends.ort import load_onnxruntime


def machine_key() -> str:
    """Name of what packed weights depend on: ONNX Runtime's version and the CPU's features."""
    digest = hashlib.sha256(" ".join(cpu_features()).encode()).hexdigest()
    return f"onnxruntime-{load_onnxruntime().__version__}-{platform.machine()}-{digest[:12]}"


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
