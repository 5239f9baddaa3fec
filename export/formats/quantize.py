"""Quantised weight formats: pure functions on arrays, laid out as the ONNX operators read them.

Two families:
- channels: int8, one symmetric scale per output row; with int8 activations (W8A8).
- blocks: 8 or 4 bits, one scale (and zero point) per run of `block` inputs of a row; weight only.
  The layout is that of `com.microsoft.MatMulNBits`: unsigned values, first element in the low
  nibble, rows padded with the zero point to a whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

INT8_MAX = 127
#: Shares of the full range tried when clipping; a block keeps the one with the least error.
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: Zero point of unsigned int8 activations: symmetric values, shifted (u8s8 kernels need VNNI only).
ACTIVATION_ZERO_POINT = 128


@dataclass(frozen=True)
class BlockFormat:
    """The blocks that a weight is cut into.

    Attributes:
        bits: 4 or 8.
        block: inputs that share a scale: 16, 32, 64, 128 or 256.
        symmetric: fixed zero point in the middle of the range; else one is stored per block.
    """

    bits: int
    block: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; supported: 4, 8")
        if self.block not in (16, 32, 64, 128, 256):
            raise ValueError(f"block is {self.block}; supported: 16, 32, 64, 128, 256")

    @property
    def levels(self) -> int:
        """Largest stored value: 15 or 255."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Zero point of the symmetric form: 8 or 128."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)


@dataclass(frozen=True)
class Blocks:
    """A weight `(rows, columns)` in blocks.

    Attributes:
        packed: uint8 `(rows, blocks, block * bits / 8)`.
        scales: float32 `(rows, blocks)`.
        zero_points: uint8 `(rows, ceil(blocks * bits / 8))`, or None when symmetric.
    """

    packed: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8] | None


def quantize_blocks(
    weight: Floats,
    form: BlockFormat,
    *,
    importance: Floats | None = None,
    ratios: Sequence[float] = CLIP_RATIOS,
) -> Blocks:
    """Quantise `(rows, columns)`, choosing each block's clipping by its squared error.

    Args:
        importance: weight of each column's error, `(columns,)`: the mean square of that input.
        ratios: shares of the full range to try; `(1.0,)` is plain round to nearest.
    """
    blocked = _to_blocks(weight, form)
    scales, zeros = choose_scales(blocked, form, importance=importance, ratios=ratios)
    values = np.empty_like(blocked)
    _round(blocked, scales, zeros, form, values)
    packed_zeros = None
    if not form.symmetric:
        packed_zeros = pack(zeros.astype(np.uint8), form.bits)
    return Blocks(pack(values.astype(np.uint8), form.bits), scales, packed_zeros)


def choose_scales(
    blocked: Floats,
    form: BlockFormat,
    *,
    importance: Floats | None = None,
    ratios: Sequence[float] = CLIP_RATIOS,
) -> tuple[Floats, Floats]:
    """Choose scale and zero point of every block, each `(rows, blocks)`.

    Args:
        blocked: `(rows, blocks, block)`, the last block padded with zeros.
        importance, ratios: see `quantize_blocks`.
    """
    low, high = _ends(blocked, form)
    scales, zeros = _scales(low, high, form, ratios[0])
    if len(ratios) == 1:
        return scales, zeros
    weights = None if importance is None else _to_blocks(importance[np.newaxis], form)[0]
    work = np.empty_like(blocked)
    error = _error(blocked, scales, zeros, form, weights, work)
    for ratio in ratios[1:]:
        other_scales, other_zeros = _scales(low, high, form, ratio)
        other_error = _error(blocked, other_scales, other_zeros, form, weights, work)
        better = other_error < error
        error = np.where(better, other_error, error)
        scales = np.where(better, other_scales, scales)
        zeros = np.where(better, other_zeros, zeros)
    return scales, zeros


def dequantize_blocks(blocks: Blocks, form: BlockFormat, columns: int) -> Floats:
    """The weight `(rows, columns)` that `blocks` stands for."""
    values = unpack(blocks.packed, form.bits).astype(np.float32)
    count = blocks.scales.shape[1]
    if blocks.zero_points is None:
        zeros = np.full(blocks.scales.shape, form.middle, np.float32)
    else:
        zeros = unpack(blocks.zero_points, form.bits)[:, :count].astype(np.float32)
    full = (values - zeros[..., np.newaxis]) * blocks.scales[..., np.newaxis]
    return np.asarray(full.reshape(len(full), -1)[:, :columns])


def quantize_channels(
    weight: Floats, scale_dtype: str = "float32"
) -> tuple[NDArray[np.int8], Floats]:
    """Quantise `(rows, columns)` to int8 with one symmetric scale per row, `(rows,)`.

    The scales are rounded up to `scale_dtype` first, so that storing them so loses nothing more.
    """
    exact = np.abs(weight).max(axis=1, initial=0.0) / INT8_MAX
    stored = exact.astype(scale_dtype)
    stored = np.where(stored < exact, np.nextafter(stored, stored.dtype.type(np.inf)), stored)
    scales = _nonzero(stored.astype(np.float32))
    values = np.rint(weight / scales[:, np.newaxis])
    return np.clip(values, -INT8_MAX, INT8_MAX).astype(np.int8), scales


def fake_quantize_activation(x: Floats, scale: float) -> Floats:
    """Return x as int8 with one scale would hold it: rounded and saturated."""
    return np.asarray(np.clip(np.rint(x / scale), -128, INT8_MAX) * np.float32(scale))


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Last axis of packed bytes -> one value each."""
    if bits == 8:
        return packed
    pair = np.stack([packed & 15, packed >> 4], axis=-1)
    return pair.reshape(*packed.shape[:-1], -1)


def block_bytes(rows: int, columns: int, form: BlockFormat, scale_bytes: int = 4) -> int:
    """Bytes a quantised weight takes: values, scales and zero points."""
    count = form.blocks(columns)
    values = rows * count * form.block * form.bits // 8
    zeros = 0 if form.symmetric else rows * -(-count * form.bits // 8)
    return values + rows * count * scale_bytes + zeros


def _to_blocks(matrix: Floats, form: BlockFormat) -> Floats:
    """(rows, columns) -> (rows, blocks, block), padded with zeros."""
    rows, columns = matrix.shape
    short = form.blocks(columns) * form.block - columns
    padded = np.pad(matrix, ((0, 0), (0, short))) if short else matrix
    return padded.reshape(rows, -1, form.block)


def _ends(blocked: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    """Range of every block, each end `(rows, blocks)`."""
    if form.symmetric:
        high = np.abs(blocked).max(axis=-1)
        return -high, high
    return np.minimum(blocked.min(axis=-1), 0), np.maximum(blocked.max(axis=-1), 0)


def _scales(low: Floats, high: Floats, form: BlockFormat, ratio: float) -> tuple[Floats, Floats]:
    """Scale and zero point per block when `ratio` of the range is kept, each `(rows, blocks)`."""
    if form.symmetric:
        scales = _nonzero(high * np.float32(ratio / (form.middle - 1)))
        return scales, np.full_like(scales, form.middle)
    low, high = low * np.float32(ratio), high * np.float32(ratio)
    scales = _nonzero((high - low) / np.float32(form.levels))
    return scales, np.clip(np.rint(-low / scales), 0, form.levels)


def _round(
    blocked: Floats, scales: Floats, zeros: Floats, form: BlockFormat, values: Floats
) -> None:
    """Write each number's stored value into `values`."""
    np.divide(blocked, scales[..., np.newaxis], out=values)
    np.rint(values, out=values)
    values += zeros[..., np.newaxis]
    np.clip(values, 0, form.levels, out=values)


def _error(
    blocked: Floats,
    scales: Floats,
    zeros: Floats,
    form: BlockFormat,
    weights: Floats | None,
    work: Floats,
) -> Floats:
    """Squared error of each block, `(rows, blocks)`; `work` is overwritten.

    Fresh arrays would take three times as long: the system hands out their pages one by one.
    """
    _round(blocked, scales, zeros, form, work)
    work -= zeros[..., np.newaxis]
    work *= scales[..., np.newaxis]
    work -= blocked
    np.square(work, out=work)
    if weights is not None:
        work *= weights
    return np.asarray(work.sum(axis=-1))


def pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Values along the last axis -> bytes, the first one in the low nibble."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4))


def _nonzero(scales: Floats) -> Floats:
    """An all-zero block has scale one: any would do but zero."""
    return np.where(scales > 0, scales, 1).astype(np.float32)
