"""The product of weights in blocks in NumPy: the rounding of the inputs, and exact integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Blocks whose largest value is smaller count as zero.
LEAST = np.float32(2.0**-118)


def round_inputs(
    x: NDArray[np.float32], block: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Round rows `(rows, inputs)` to int8 block by block, the last filled up with zeros.

    Returns:
        Integers `(rows, blocks, block)` and the scale of each block, `(rows, blocks)`.
    """
    short = -x.shape[1] % block
    blocked = np.pad(x, ((0, 0), (0, short))).reshape(len(x), -1, block)
    largest = np.abs(blocked).max(axis=-1)
    used = (largest >= LEAST) & np.isfinite(largest)
    factor = np.where(used, np.float32(127) / np.where(used, largest, 1), 0).astype(np.float32)
    finite = np.where(np.isfinite(blocked), blocked, 0)
    rounded = np.rint(finite * factor[..., np.newaxis]).astype(np.int64)
    scales = np.where(largest < LEAST, np.float32(0), largest / np.float32(127))
    return rounded, np.where(np.isfinite(largest), scales, np.nan).astype(np.float32)


def integer_weights(values: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Return what values stand for, `(columns, blocks, block)`; see `integer_sums`."""
    if bits == 8:
        return values.astype(np.int64) - 128
    pairs = np.stack([values & 15, values >> 4], axis=-1)
    return pairs.reshape(*values.shape[:2], -1).astype(np.int64) - 8


def integer_sums(
    rounded: NDArray[np.int64], values: NDArray[np.uint8], bits: int
) -> NDArray[np.int64]:
    """Sum products block by block.

    Args:
        rounded: `(rows, blocks, block)`.
        values: `(columns, blocks, block * bits / 8)`.

    Returns:
        `(rows, columns, blocks)`.
    """
    weight = integer_weights(values, bits)
    return np.asarray(np.einsum("mbk,nbk->mnb", rounded, weight))


def multiply(
    x: NDArray[np.float32],
    values: NDArray[np.uint8],
    scales: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    bits: int,
) -> NDArray[np.float64]:
    """Multiply as `BlockLibrary.multiply` does, blocks added in float64."""
    rounded, x_scales = round_inputs(x, values.shape[2] * 8 // bits)
    sums = integer_sums(rounded, values, bits)
    both: NDArray[Any] = x_scales.astype(np.float64)[:, np.newaxis] * scales
    product = (sums * both).sum(axis=-1)
    return np.asarray(product if bias is None else product + bias)


def mix_experts(
    x: NDArray[np.float32],
    logits: NDArray[np.float32],
    gated: tuple[NDArray[np.uint8], NDArray[np.float32]],
    down: tuple[NDArray[np.uint8], NDArray[np.float32]],
    *,
    chosen: int,
    bits: int,
) -> NDArray[np.float64]:
    """Send rows through the experts that have the largest logits, products as `multiply` has them.

    Args:
        x: `(rows, hidden)`.
        logits: `(rows, experts)`.
        gated, down: values `(experts, columns, blocks, block * bits / 8)` and scales
            `(experts, columns, blocks)`, of gates and ups in turns, and of what leads back.

    Returns:
        `(rows, hidden)`.
    """
    mixed = np.zeros(x.shape)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :chosen]
    for row, experts in enumerate(order):
        shares = np.exp(logits[row, experts].astype(np.float64) - logits[row].max())
        for share, expert in zip(shares / shares.sum(), experts, strict=True):
            weights = gated[0][expert], gated[1][expert]
            both = multiply(x[row : row + 1], *weights, bits=bits)
            gate, up = both[:, ::2], both[:, 1::2]
            inner = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
            mixed[row] += share * multiply(inner, down[0][expert], down[1][expert], bits=bits)[0]
    return mixed
