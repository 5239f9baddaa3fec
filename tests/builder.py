"""Marks for tests that need TensorRT for RTX, or ONNX Runtime's newest operators."""

from __future__ import annotations

import platform
import sys

import pytest


def _newest_operators() -> bool:
    """onnxruntime before 1.24, the newest for Python 3.10, has no TensorScatter."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return any(schema.name == "TensorScatter" for schema in get_all_operator_schema())


_HAS_WHEELS = sys.platform == "win32" or (
    sys.platform == "linux" and platform.machine() == "x86_64"
)
needs_builder = pytest.mark.skipif(
    not _HAS_WHEELS, reason="TensorRT for RTX has no wheels for this platform"
)
needs_newest = pytest.mark.skipif(
    not _newest_operators(), reason="this onnxruntime has no TensorScatter"
)
