"""Which TensorRT dialects the installed ONNX Runtime can run."""

from __future__ import annotations

from typing import Any

import pytest

from internvl_edge.bundle.contract import DialectName

TENSORRT: tuple[DialectName, ...] = ("tensorrt", "tensorrt-portable")


def _newest_operators() -> bool:
    """onnxruntime before 1.24, the newest for Python 3.10, has no TensorScatter."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return any(schema.name == "TensorScatter" for schema in get_all_operator_schema())


def runs(dialect: DialectName) -> Any:
    """A parameter that is skipped where ONNX Runtime lacks the modern level's operators."""
    reason = "this onnxruntime has no TensorScatter"
    old = dialect == "tensorrt" and not _newest_operators()
    return pytest.param(dialect, marks=pytest.mark.skipif(old, reason=reason))


RUNNABLE = [runs(dialect) for dialect in TENSORRT]
