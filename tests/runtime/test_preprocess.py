"""Tiling against Pillow and against the resize's own definition, on awkward sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.runtime.images.decode import load_image
from internvl_edge.runtime.images.preprocess import resize, select_grid, tile_image

sides = st.integers(1, 90)


def _axis_weights(size: int, target: int) -> NDArray[np.int64]:
    """Fixed-point bicubic weights `(target, size)`: Keys a = -0.5, antialiased, 22 bits."""
    scale = size / target
    width = max(scale, 1.0)
    weights = np.zeros((target, size), np.int64)
    for out in range(target):
        centre = (out + 0.5) * scale
        low = max(int(centre - 2 * width + 0.5), 0)
        high = min(int(centre + 2 * width + 0.5), size)
        x = np.abs((np.arange(low, high) - centre + 0.5) / width)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        kernel /= kernel.sum()
        fixed = kernel * (1 << 22)
        weights[out, low:high] = np.where(fixed < 0, fixed - 0.5, fixed + 0.5).astype(np.int64)
    return weights


def _resize_axis(pixels: NDArray[np.uint8], axis: int, target: int) -> NDArray[np.uint8]:
    if pixels.shape[axis] == target:
        return pixels
    moved = np.moveaxis(pixels.astype(np.int64), axis, -1)
    total = moved @ _axis_weights(pixels.shape[axis], target).T + (1 << 21)
    return np.moveaxis(np.clip(total >> 22, 0, 255).astype(np.uint8), -1, axis)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, to_height=sides, to_width=sides, seed=st.integers(0, 2**32 - 1))
def test_resize_is_horizontal_first_fixed_point(
    height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    got = np.asarray(resize(Image.fromarray(pixels), to_width, to_height))
    across = _resize_axis(pixels, 1, to_width)
    np.testing.assert_array_equal(got, _resize_axis(across, 0, to_height))


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    max_tiles=st.integers(1, 40),
    thumbnail=st.booleans(),
)
def test_tiles_reassemble_to_the_resized_image(
    width: int, height: int, max_tiles: int, thumbnail: bool
) -> None:
    side = 28
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    columns, rows = select_grid(width, height, max_tiles=max_tiles, tile_size=side)
    assert 1 <= columns * rows <= max_tiles
    tiles = tile_image(image, tile_size=side, max_tiles=max_tiles, thumbnail=thumbnail)
    extra = int(thumbnail and columns * rows > 1)
    assert tiles.shape == (columns * rows + extra, side, side, 3)
    whole = np.asarray(resize(image, columns * side, rows * side))
    for index in range(columns * rows):
        top, left = index // columns * side, index % columns * side
        np.testing.assert_array_equal(tiles[index], whole[top : top + side, left : left + side])
    if extra:
        np.testing.assert_array_equal(tiles[-1], np.asarray(resize(image, side, side)))


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((500, 400), 6, (1, 1)),  # 1.25 is half-way between 1:1 and 3:2, and the image is small
        ((5000, 4000), 6, (3, 2)),
        ((700, 400), 6, (2, 1)),
        ((7000, 4000), 6, (3, 2)),
        ((10, 30), 12, (1, 3)),
        ((3840, 2160), 40, (7, 4)),
    ],
)
def test_grids_named_in_the_specification(
    size: tuple[int, int], max_tiles: int, grid: tuple[int, int]
) -> None:
    assert select_grid(*size, max_tiles=max_tiles, tile_size=448) == grid


def test_all_kinds_of_source_are_one_image(tmp_path: object) -> None:
    from io import BytesIO

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    for source in (pixels, Image.fromarray(pixels), stream.getvalue()):
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels)
