"""The library's operations of a vision tower: its paths, and one on the calling thread."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.operators.library import OperatorLibrary

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rounding:
    """How results become bytes, as QuantizeLinear does it.

    Attributes:
        scale, zero: of it.
        factors: `(columns,)`, by which results are multiplied before.
    """

    scale: float
    zero: int = 128
    factors: Floats | None = None


class _Rounding(ctypes.Structure):
    _fields_ = (("factors", ctypes.c_void_p), ("scale", ctypes.c_float), ("zero", ctypes.c_int32))


class _Output(ctypes.Structure):
    _fields_ = (
        *(("floats", ctypes.c_void_p), ("bytes", ctypes.c_void_p), ("apart", ctypes.c_int64)),
        ("rounding", _Rounding),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "added", "sum", "weight", "bias")),
        *(("rows", ctypes.c_int64), ("width", ctypes.c_int64)),
        *(("epsilon", ctypes.c_float), ("centred", ctypes.c_bool), ("out", _Output)),
    )


class _Gelu(ctypes.Structure):
    _fields_ = (
        *(("x", ctypes.c_void_p), ("rows", ctypes.c_int64), ("width", ctypes.c_int64)),
        ("out", _Output),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns")),
    )


class _IntegerProduct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns")),
        *(("scale", ctypes.c_float), ("zero", ctypes.c_int32), ("gelu", ctypes.c_bool)),
        ("out", _Output),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "q_weight", "k_weight")),
        *((name, ctypes.c_int64) for name in ("tiles", "tokens", "heads", "size")),
        *(("epsilon", ctypes.c_float), ("out", _Output)),
    )


class VisionLibrary(OperatorLibrary):
    """The operations in a build of the library; see `OperatorLibrary`.

    Arrays are contiguous, results float32 unless they are rounded.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "vision")

    @property
    def multiplies_fast(self) -> bool:
        """Whether the fastest path's integer products are as fast as ONNX Runtime's."""
        fast = self._entry("multiplies_fast")
        fast.restype, fast.argtypes = ctypes.c_bool, [ctypes.c_int32]
        return bool(fast(0))

    def norm(
        self,
        x: Floats,
        weight: Floats,
        bias: Floats | None = None,
        *,
        epsilon: float,
        centred: bool,
        path: str,
        added: Floats | None = None,
        rounding: Rounding | None = None,
    ) -> tuple[NDArray[Any], Floats]:
        """Norm rows.

        Args:
            x: `(rows, width)`; `added` alike.
            centred: as LayerNormalization; else by root mean squares.

        Returns:
            What is normed, and the rows, with those added.
        """
        total = np.empty_like(x) if added is not None else x
        held, out = _output(x.shape, rounding)
        norm = _Norm(
            *(_address(a) for a in (x, added, total if added is not None else None, weight, bias)),
            *(*x.shape, epsilon, centred, out),
        )
        self.call("norm", norm, path)
        return held, total

    def gelu(self, x: Floats, *, path: str, rounding: Rounding | None = None) -> NDArray[Any]:
        """Return GELU of rows `(rows, width)`."""
        held, out = _output(x.shape, rounding)
        gelu = _Gelu(_address(x), *x.shape, out)
        self.call("gelu", gelu, path)
        return held

    def multiply(
        self, x: Floats, weight: Floats, bias: Floats | None = None, *, path: str
    ) -> Floats:
        """Multiply rows `(rows, inputs)` by a weight `(columns, inputs)`."""
        y = np.empty((len(x), len(weight)), np.float32)
        addresses = (_address(a) for a in (x, weight, bias, y))
        product = _Product(*addresses, *x.shape, len(weight))
        self.call("multiply", product, path)
        return y

    def multiply_integers(
        self,
        x: NDArray[np.uint8],
        weight: NDArray[np.int8],
        scales: Floats,
        bias: NDArray[np.int32] | None = None,
        *,
        scale: float,
        zero: int,
        path: str,
        gelu: Rounding | None = None,
    ) -> NDArray[Any]:
        """Multiply rows `(rows, inputs)`, less their zero point, by a weight `(columns, inputs)`.

        Args:
            scales, bias: `(columns,)`; results are times theirs and the rows' scale.
            gelu: how GELU of the results is rounded; None gives them as they are.

        Returns:
            `(rows, columns)`.

        Raises:
            MemoryError: the packed rows could not be had.
        """
        held, out = _output((len(x), len(weight)), gelu)
        product = _IntegerProduct(
            *(_address(a) for a in (x, weight, scales, bias)),
            *(*x.shape, len(weight), scale, zero, gelu is not None, out),
        )
        if self.call("multiply_integers", product, path):
            raise MemoryError(f"no memory for {len(x)} packed rows")
        return held

    def attend(
        self,
        query: Floats,
        key: Floats,
        value: Floats,
        *,
        heads: int,
        path: str,
        norms: tuple[Floats, Floats, float] | None = None,
        rounding: Rounding | None = None,
    ) -> NDArray[Any]:
        """Let every token of a tile attend to all of them.

        Args:
            query: `(tiles, tokens, width)`; `key` and `value` alike.
            norms: weights `(width,)` by which queries and keys are normed before, and the epsilon.

        Returns:
            `(tiles, tokens, width)`.

        Raises:
            MemoryError: the rounded tokens could not be had.
        """
        tiles, tokens, width = query.shape
        held, out = _output((tiles * tokens, width), rounding)
        *weights, epsilon = norms or (None, None, 0.0)
        attention = _Attention(
            *(_address(a) for a in (query, key, value, *weights)),
            *(tiles, tokens, heads, width // heads, epsilon, out),
        )
        if self.call("attend", attention, path):
            raise MemoryError(f"no memory for {tokens} rounded tokens")
        return held.reshape(query.shape)


def _address(array: NDArray[Any] | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def _output(shape: tuple[int, ...], rounding: Rounding | None) -> tuple[NDArray[Any], _Output]:
    """Return an array for results, and its description."""
    if rounding is None:
        held: NDArray[Any] = np.empty(shape, np.float32)
        return held, _Output(_address(held), None, shape[1], _Rounding(None, 1, 0))
    held = np.empty(shape, np.uint8)
    how = _Rounding(_address(rounding.factors), rounding.scale, rounding.zero)
    return held, _Output(None, _address(held), shape[1], how)
