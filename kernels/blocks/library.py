"""The library of products of weights in blocks: paths, and one product on the calling thread."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.operators.library import OperatorLibrary

#: Inputs that may share a scale.
BLOCKS = (32, 64, 128, 256)


class Product(ctypes.Structure):
    """`ive::blocks::Product`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "values", "scales", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns", "block", "bits")),
    )


class BlockLibrary(OperatorLibrary):
    """Products of weights in blocks in a build of the library; see `OperatorLibrary`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "blocks")

    def multiply(
        self,
        x: NDArray[np.float32],
        values: NDArray[np.uint8],
        scales: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
        *,
        bits: int,
        path: str,
    ) -> NDArray[np.float32]:
        """Multiply rows by a weight, as MatMulNBits stores it.

        Args:
            x: `(rows, inputs)`.
            values: `(columns, blocks, block * bits / 8)`; of two in a byte the earlier in the lower
                half.
            scales: `(columns, blocks)`.
            bias: `(columns,)`.
            bits: of a value, 4 or 8.
            path: one of `paths`.

        Returns:
            `(rows, columns)`.

        Raises:
            ValueError: shapes do not fit each other, or there is no such path.
            MemoryError: the rounded inputs could not be had.
        """
        rows, inputs = x.shape
        columns, blocks, size = values.shape
        block = size * 8 // bits
        if (
            block not in BLOCKS
            or blocks != -(-inputs // block)
            or scales.shape != (columns, blocks)
        ):
            raise ValueError(f"{values.shape} and {scales.shape} are no weight of {inputs} inputs")
        if bias is not None and bias.shape != (columns,):
            raise ValueError(f"the bias is {bias.shape}, the weight has {columns} columns")
        held = [None if a is None else np.ascontiguousarray(a) for a in (x, values, scales, bias)]
        y = np.empty((rows, columns), np.float32)
        addresses = [None if a is None else a.ctypes.data for a in (*held, y)]
        product = Product(*addresses, rows, inputs, columns, block, bits)
        if self.call("multiply", product, path):
            raise MemoryError(f"no memory for {rows} rounded rows")
        return y
