"""The resize of torchvision: the same kernel, weights of 16 bits, against its own definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.kernels import ops, reference
from internvl_edge.kernels.images import planes_of
from internvl_edge.kernels.jobs import TilePlan
from internvl_edge.kernels.weights import FRACTION_BITS, axis_weights

SIDE = 28
sides = st.integers(1, 90)


def short_weights(size: int, target: int) -> tuple[NDArray[np.int64], int]:
    """Weights `(target, size)` of one pass, and their fractional bits: loops, as PyTorch's."""
    scale = size / target
    reach = max(scale, 1.0)
    exact = np.zeros((target, size))
    for out in range(target):
        centre = (out + 0.5) * scale
        low = max(int(centre - 2 * reach + 0.5), 0)
        high = min(int(centre + 2 * reach + 0.5), size)
        for tap in range(low, high):
            x = abs((tap - centre + 0.5) * (1 / reach))
            near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
            exact[out, tap] = near if x < 1 else far if x < 2 else 0.0
        exact[out] /= sum(exact[out, low:high].tolist())
    bits = max(p for p in range(FRACTION_BITS + 1) if p == 0 or _fits(exact.max(), p))
    scaled = exact * 2**bits
    return np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int64), bits


def _fits(largest: float, bits: int) -> bool:
    return int(0.5 + largest * 2**bits) < 2**15


def resized(pixels: NDArray[np.uint8], axis: int, target: int) -> NDArray[np.uint8]:
    """One pass with 64-bit sums."""
    if pixels.shape[axis] == target:
        return pixels
    weights, bits = short_weights(pixels.shape[axis], target)
    total = np.moveaxis(pixels.astype(np.int64), axis, -1) @ weights.T
    rounded = (total + (1 << bits >> 1)) >> bits
    return np.moveaxis(np.clip(rounded, 0, 255).astype(np.uint8), -1, axis)


@settings(max_examples=80)
@given(
    height=sides,
    width=sides,
    columns=st.integers(1, 3),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_tiles_are_those_of_the_definition(
    height: int, width: int, columns: int, rows: int, seed: int
) -> None:
    """By the kernel and by the fallback."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    across = resized(pixels, 1, columns * SIDE)
    whole = resized(across, 0, rows * SIDE).reshape(rows, SIDE, columns, SIDE, 3)
    expected = whole.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    plan = TilePlan.of(columns, rows, SIDE, 14, False, "tiles", None, short_weights=True)
    fallback = np.empty(plan.shape, plan.dtype)
    reference.tile(planes_of(pixels), plan, fallback)
    np.testing.assert_array_equal(fallback, expected)
    grid = {"columns": columns, "rows": rows, "tile_size": SIDE, "thumbnail": False}
    np.testing.assert_array_equal(ops.tile(pixels, **grid, short_weights=True), expected)


@settings(max_examples=200)
@given(size_in=st.integers(1, 5000), size_out=st.integers(1, 3000))
def test_weights_and_sums_fit(size_in: int, size_out: int) -> None:
    axis = axis_weights(size_in, size_out, short=True)
    weights = axis.weights.astype(np.int64)
    assert np.abs(weights).sum(1).max() * 255 + (1 << (FRACTION_BITS - 1)) < 2**31
    lowest = weights[weights != 0]
    shift = min(int(value & -value).bit_length() - 1 for value in lowest.tolist())
    assert np.abs(weights >> shift).max() < 2**15


def test_both_kinds_of_weights_are_kept_apart() -> None:
    assert axis_weights(640, 1792, True) is axis_weights(640, 1792, True)
    assert (axis_weights(640, 1792, True).weights != axis_weights(640, 1792).weights).any()
