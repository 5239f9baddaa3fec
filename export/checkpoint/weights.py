"""Weights on their way from checkpoint to bundle: lazy, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import CheckpointError, RangeError
from internvl_edge.export.checkpoint.checkpoint import WeightSource

Blocks = Callable[[], Iterator[NDArray[np.generic]]]


@dataclass(frozen=True)
class Weight:
    """A tensor to be written: `blocks` yields its values in order, a run of rows at a time.

    Of dtype "int4" they are bytes of two values, the first one in the low nibble.

    Attributes:
        name: canonical, with what the tensor has become behind it.
        origin: what the checkpoint calls it, for messages; empty for what export computes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Blocks
    origin: str = ""

    @classmethod
    def held(cls, name: str, values: NDArray[np.generic]) -> Weight:
        """A small tensor that is in memory already."""
        return cls(name, str(values.dtype), values.shape, lambda: iter([values]))

    @property
    def label(self) -> str:
        """What a message calls it: as the checkpoint does."""
        return self.origin or self.name

    @property
    def nbytes(self) -> int:
        count = int(np.prod(self.shape))
        return -(-count // 2) if self.dtype == "int4" else count * np.dtype(self.dtype).itemsize

    def cast_blocks(self) -> Iterator[NDArray[np.generic]]:
        """The blocks in `dtype`.

        Raises:
            CheckpointError: a value is NaN or infinite.
            RangeError: a finite value does not fit `dtype`.
        """
        if self.dtype not in ("float32", "float16"):  # packed already
            yield from self.blocks()
            return
        for block in self.blocks():
            wide = block.astype(np.float32)
            if not np.isfinite(wide).all():
                raise CheckpointError(
                    f"{self.label} holds NaN or infinite values; the checkpoint is"
                    " damaged, download it again"
                )
            with np.errstate(over="ignore"):  # the overflow is looked for right below
                cast = wide.astype(self.dtype, copy=False)
            if not np.isfinite(cast).all():
                largest = float(np.abs(wide).max())
                raise RangeError(
                    f"{self.label} reaches {largest:.6g}, {self.dtype} ends at"
                    f" {np.finfo(self.dtype).max}; export this part as fp32"
                )
            yield cast


class WeightReader:
    """Makes `Weight`s of one dtype from a source, under canonical names."""

    def __init__(self, source: WeightSource, dtype: str) -> None:
        self._source = source
        self.dtype = dtype

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Weight:
        """A tensor as it is, or viewed in another shape of the same size."""
        stored = self._source.shape(name)
        return Weight(
            name,
            self.dtype,
            shape or stored,
            lambda: self._source.blocks(name),
            self._source.origin(name),
        )

    def whole(self, name: str) -> NDArray[np.float32]:
        """A small tensor, read at once, in float32."""
        parts = [block.astype(np.float32) for block in self._source.blocks(name)]
        return np.concatenate(parts)

    def computed(self, name: str, values: NDArray[np.generic]) -> Weight:
        """A tensor derived from a stored one, small enough to be held."""
        origin = self._source.origin(name)
        return Weight(name, self.dtype, values.shape, lambda: iter([values]), origin)


def resample_positions(table: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Resample a position table to another patch grid.

    Bicubic with a = -0.75, half-pixel centres, clamped edges, no antialiasing: what PyTorch's
    `interpolate(mode="bicubic", align_corners=False)` computes.

    Args:
        table: float32 `(1 + grid * grid, hidden)`, class token first.

    Returns:
        float32 `(1 + rows * columns, hidden)`.
    """
    grid = round((len(table) - 1) ** 0.5)
    if (rows, columns) == (grid, grid):
        return table
    patches = table[1:].reshape(grid, grid, -1).astype(np.float64)
    patches = np.einsum("or,rch->och", _bicubic(grid, rows), patches)
    patches = np.einsum("oc,rch->roh", _bicubic(grid, columns), patches)
    resampled = patches.reshape(rows * columns, -1).astype(np.float32)
    return np.concatenate([table[:1], resampled])


def _bicubic(size: int, target: int) -> NDArray[np.float64]:
    """Interpolation matrix `(target, size)`."""
    matrix = np.zeros((target, size))
    a = -0.75
    for out in range(target):
        centre = (out + 0.5) * size / target - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            x = abs(centre - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[out, min(max(tap, 0), size - 1)] += near if x <= 1 else far
    return matrix
