"""The bicubic resize's weights, once per (length in, length out): what every build works from.

Keys' kernel with a = -0.5, widened by the scale when shrinking, in fixed point with 22 fractional
bits. Every operation is in Pillow's order and in double precision, so that the integers are equal.

PyTorch's resize of bytes, torchvision's, keeps the same weights in 16 bits instead, with as many
fractional ones as the largest weight of the pass leaves. Shifted left to 22 they give the same
pixels: shifting commutes with rounding the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS = 22
#: A short weight is less than this.
_SHORT_LIMIT = 1 << 15


@dataclass(frozen=True)
class Weights:
    """Output o is the sum over k < count[o] of weights[o, k] * input[low[o] + k]."""

    low: NDArray[np.int32]  # (size,)
    count: NDArray[np.int32]  # (size,)
    weights: NDArray[np.int32]  # (size, taps), zero beyond count
    size_in: int
    short: bool

    @property
    def taps(self) -> int:
        return int(self.weights.shape[1])

    @property
    def size(self) -> int:
        return int(self.weights.shape[0])


@lru_cache(maxsize=64)
def axis_weights(size_in: int, size_out: int, short: bool = False) -> Weights:
    """Weights that resize an axis of `size_in` pixels to `size_out`; both at least 1.

    Args:
        short: whether they are rounded to 16 bits, as PyTorch's; else to Pillow's 22.
    """
    if size_in == size_out:  # the pass is skipped: one tap of weight one is the identity
        one = np.full((size_out, 1), 1 << FRACTION_BITS, np.int32)
        low = np.arange(size_out, dtype=np.int32)
        return _frozen(low, np.ones(size_out, np.int32), one, size_in, short)
    scale = size_in / size_out
    reach = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    low = np.maximum((centre - 2.0 * reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + 2.0 * reach + 0.5).astype(np.int64), size_in) - low
    tap = np.arange(int(count.max()))
    x = np.abs(((tap + low[:, None]) - centre[:, None] + 0.5) * (1.0 / reach))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    kernel = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    kernel[tap >= count[:, None]] = 0.0
    total = np.zeros(size_out)
    for k in range(len(tap)):  # in order: NumPy's own sum is pairwise and rounds differently
        total += kernel[:, k]
    exact = kernel / total[:, None]
    bits = _short_bits(float(exact.max())) if short else FRACTION_BITS
    fixed = exact * (1 << bits)
    whole = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int32)
    shifted = whole << (FRACTION_BITS - bits)
    return _frozen(low.astype(np.int32), count.astype(np.int32), shifted, size_in, short)


def _short_bits(largest: float) -> int:
    """Return how many fractional bits the largest weight leaves a short one."""
    bits = 0
    while bits < FRACTION_BITS and int(0.5 + largest * (1 << (bits + 1))) < _SHORT_LIMIT:
        bits += 1
    return bits


def _frozen(
    low: NDArray[np.int32],
    count: NDArray[np.int32],
    weights: NDArray[np.int32],
    size_in: int,
    short: bool,
) -> Weights:
    """Contiguous and read-only: cached arrays are shared by every call."""
    arrays = [np.ascontiguousarray(array) for array in (low, count, weights)]
    for array in arrays:
        array.flags.writeable = False
    return Weights(arrays[0], arrays[1], arrays[2], size_in, short)
