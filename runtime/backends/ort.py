"""ONNX Runtime, imported in one place: with its telemetry off, and in a version that was tried."""

from __future__ import annotations

import functools
import os
import re
import warnings
from typing import Any

from internvl_edge.bundle.errors import VersionWarning
from internvl_edge.bundle.signals import signals_held

#: From 1.29 on ONNX Runtime for Linux writes a device id and a database of events below the user's
#: cache when it is imported, and sends events to its maker, unless this is set.
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"

#: Lowest and highest version of ONNX Runtime that were tried: see docs/versions.md.
TRIED = ("1.22.0", "1.32.0")


@functools.cache
def load_onnxruntime() -> Any:
    """Import ONNX Runtime without telemetry, unless the user has set `ORT_DISABLE_TELEMETRY`.

    Returns:
        the module `onnxruntime`.

    Warns:
        VersionWarning: its version is outside those that were tried.
    """
    os.environ.setdefault(TELEMETRY_OFF, "1")
    with signals_held():
        import onnxruntime

    if not is_tried(onnxruntime.__version__):
        warnings.warn(
            f"onnxruntime {onnxruntime.__version__} was not tried with this internvl-edge,"
            f" versions {TRIED[0]} to {TRIED[1]} were; if something is amiss, install"
            f" 'onnxruntime>={TRIED[0]},<={TRIED[1]}'",
            VersionWarning,
            stacklevel=2,
        )
    return onnxruntime


def is_tried(version: str) -> bool:
    """Return whether a version of ONNX Runtime lies within `TRIED`, whatever its suffix."""
    lowest, highest = map(_release, TRIED)
    return lowest <= _release(version) <= highest


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers: 1.23.2 of 1.23.2.dev5; none where there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
