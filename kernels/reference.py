"""Every kernel in NumPy, bit for bit: the fallback without a compiler and the tests' reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.images import Planes
from internvl_edge.kernels.jobs import ShufflePlan, TilePlan
from internvl_edge.kernels.weights import FRACTION_BITS, axis_weights

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)

# 16 fractional bits: luma, red of V, green of U and of V, blue of U.
_YUV = {"bt601": (104597, 25675, 53279, 132201), "bt709": (117489, 13975, 34925, 138438)}
_LUMA = 76309

#: Rows resized at a time; bounds the int32 sums to a few megabytes.
_STRIP = 64


def tile(planes: Planes, plan: TilePlan, out: NDArray[Any]) -> None:
    """Resize, cut and normalise into `out`, of `plan.shape` and `plan.dtype`."""
    pixels = to_rgb(planes)
    side, columns, rows = plan.tile_size, plan.columns, plan.rows
    short = plan.short_weights
    grid = resize(pixels, columns * side, rows * side, short)
    # (rows * S, columns * S, 3) -> (rows, S, columns, S, 3) -> (rows * columns, S, S, 3)
    tiles = grid.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if plan.thumbnail:
        tiles = np.concatenate([tiles, resize(pixels, side, side, short)[np.newaxis]])
    for at, one in enumerate(tiles):  # a tile at a time: no float array of full size
        out[at] = one if plan.layout == "tiles" else _arranged(normalise(one), plan)


def to_rgb(planes: Planes) -> NDArray[np.uint8]:
    """Any accepted image as `(H, W, 3)` RGB."""
    if planes.chroma is not None:
        return _nv12_to_rgb(planes.pixels, planes.chroma, planes.matrix)
    if planes.pixel_format == "bgr":
        return planes.pixels[..., ::-1]
    return planes.pixels[..., :3]


def resize(
    pixels: NDArray[np.uint8], width: int, height: int, short: bool = False
) -> NDArray[np.uint8]:
    """Antialiased bicubic `(H, W, 3)` -> `(height, width, 3)`: horizontal pass first.

    Args:
        short: see `axis_weights`.
    """
    across = _resample(pixels.swapaxes(0, 1), width, short).swapaxes(0, 1)
    return _resample(across, height, short)


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(pixel / 255 - mean) / std in float32, `(H, W, 3)` -> `(3, H, W)`."""
    return ((pixels.astype(np.float32) / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)


def pixel_shuffle(
    features: NDArray[Any],
    plan: ShufflePlan,
    weight: NDArray[np.float32] | None,
    bias: NDArray[np.float32] | None,
    out: NDArray[Any],
) -> None:
    """Shuffle, normalise and convert into `out`, of `plan.shape` and `plan.dtype`."""
    x = shuffle(features[:, 1:], plan.rows, plan.columns, plan.version)
    for at, tokens in enumerate(x):
        y = tokens.astype(np.float32)
        if weight is not None and bias is not None:
            y = layer_norm(y, weight, bias, plan.eps)
        out[at] = quantise(y, plan.scale) if plan.scale is not None else y


def shuffle(patches: NDArray[Any], rows: int, columns: int, version: str) -> NDArray[Any]:
    """`(tiles, rows * columns, C)` -> `(tiles, rows/2 * columns/2, 4C)`; v1: groups by column."""
    tiles, _, channels = patches.shape
    groups = patches.reshape(tiles, rows // 2, 2, columns // 2, 2, channels)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return groups.transpose(order).reshape(tiles, rows * columns // 4, 4 * channels)


def layer_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float
) -> NDArray[np.float32]:
    """LayerNorm over the last axis: statistics in float64, rounded once."""
    mean = x.mean(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = x - mean
    variance = np.mean(np.square(centred, dtype=np.float64), -1, keepdims=True)
    inverse = (1.0 / np.sqrt(variance + eps)).astype(np.float32)
    result: NDArray[np.float32] = centred * inverse * weight + bias
    return result


def quantise(x: NDArray[np.float32], scale: float) -> NDArray[np.int8]:
    """Round half to even, saturate to -128..127."""
    steps: NDArray[np.float32] = np.rint(x / np.float32(scale))
    return steps.clip(-128, 127).astype(np.int8)


def _resample(pixels: NDArray[np.uint8], target: int, short: bool) -> NDArray[np.uint8]:
    """Resize the first axis of `(n, m, 3)` to `target`."""
    if len(pixels) == target:
        return pixels
    axis = axis_weights(len(pixels), target, short)
    out = np.empty((target, *pixels.shape[1:]), np.uint8)
    for begin in range(0, target, _STRIP):
        part = slice(begin, begin + _STRIP)
        low, weights = axis.low[part], axis.weights[part]
        total = np.full(out[part].shape, 1 << (FRACTION_BITS - 1), np.int32)
        for k in range(int(axis.count[part].max())):
            lines = pixels[np.minimum(low + k, len(pixels) - 1)]  # beyond count the weight is 0
            total += lines * weights[:, k, np.newaxis, np.newaxis]
        out[part] = np.clip(total >> FRACTION_BITS, 0, 255)
    return out


def _arranged(planes: NDArray[np.float32], plan: TilePlan) -> NDArray[np.float32]:
    """`(3, S, S)` as it is, or as patches `((S / p)^2, 3 * p * p)` of (channel, row, column)."""
    if plan.layout == "nchw":
        return planes
    p, across = plan.patch_size, plan.tile_size // plan.patch_size
    grid = planes.reshape(3, across, p, across, p).transpose(1, 3, 0, 2, 4)
    return grid.reshape(across * across, 3 * p * p)


def _nv12_to_rgb(
    luma: NDArray[np.uint8], chroma: NDArray[np.uint8], matrix: str
) -> NDArray[np.uint8]:
    """Video range to RGB; a chroma sample covers its 2 x 2 pixels."""
    height, width = luma.shape
    uv = chroma.reshape(chroma.shape[0], -1, 2).astype(np.int32) - 128
    uv = uv.repeat(2, 0)[:height].repeat(2, 1)[:, :width]  # (H, W, 2)
    u, v = uv[..., 0], uv[..., 1]
    red_v, green_u, green_v, blue_u = _YUV[matrix]
    y = (luma.astype(np.int32) - 16) * _LUMA + (1 << 15)
    rgb = np.stack([y + red_v * v, y - green_u * u - green_v * v, y + blue_u * u], -1)
    pixels: NDArray[np.uint8] = np.clip(rgb >> 16, 0, 255).astype(np.uint8)
    return pixels
