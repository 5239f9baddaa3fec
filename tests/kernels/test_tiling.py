"""Tiling on the CPU: bit-equal to Pillow up to 12, with the C++ library and with the fallback.

The installed Pillow is asked for one axis at a time, horizontally first: the order of versions up
to 12, in which every version agrees. `pillow_tiles.json` holds what several versions made of the
same images in one call (`pillow_tiles.py` wrote it).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pillow_tiles import CASES, noise

from internvl_edge.kernels import ops, reference
from internvl_edge.kernels.images import planes_of
from internvl_edge.kernels.jobs import TilePlan
from internvl_edge.kernels.weights import FRACTION_BITS, axis_weights
from internvl_edge.runtime.images.preprocess import resize, select_grid

pytestmark = pytest.mark.slow(seconds=1)

GRIDS = [(c, r) for c in range(1, 41) for r in range(1, 41) if c * r <= 40]
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)

#: Keeps an example to some tens of milliseconds; single large ones are below.
MOST_PIXELS = 300_000


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(width, height), each in 1..5000."""
    long = draw(st.integers(1, 5000))
    short = draw(st.integers(1, max(1, min(5000, MOST_PIXELS // long))))
    return (long, short) if draw(st.booleans()) else (short, long)


@pytest.fixture(params=["library", "fallback"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the C++ library and with NumPy alone."""
    if request.param == "fallback":
        monkeypatch.setattr(ops, "cpu_kernels", lambda: None)
    elif ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    return str(request.param)


def by_pillow(
    pixels: NDArray[np.uint8], columns: int, rows: int, side: int, thumbnail: bool = True
) -> NDArray[np.uint8]:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    whole = np.asarray(resize(image, columns * side, rows * side))
    tiles = [
        whole[y * side : (y + 1) * side, x * side : (x + 1) * side]
        for y in range(rows)
        for x in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(np.asarray(resize(image, side, side)))
    return np.stack(tiles)


def by_numpy(pixels: NDArray[np.uint8], **options: Any) -> NDArray[Any]:
    """The reference, whatever library is at hand."""
    formats = {k: options.pop(k) for k in ("pixel_format", "matrix") if k in options}
    defaults = {"patch_size": 14, "thumbnail": True, "layout": "tiles", "dtype": None}
    plan = TilePlan.of(**(defaults | options))
    out = np.empty(plan.shape, plan.dtype)
    reference.tile(planes_of(pixels, **formats), plan, out)
    return out


@settings(max_examples=400, deadline=None)
@given(
    size=sizes(),
    grid=st.sampled_from(GRIDS),
    side=st.sampled_from([16, 28, 30, 56]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_tiles_are_bit_equal_to_pillow(
    size: tuple[int, int], grid: tuple[int, int], side: int, threads: int, seed: int
) -> None:
    pixels = noise(*size, seed)
    got = ops.tile(pixels, columns=grid[0], rows=grid[1], tile_size=side, threads=threads)
    np.testing.assert_array_equal(got, by_pillow(pixels, *grid, side))


@settings(max_examples=60, deadline=None)
@given(size=sizes(), grid=st.sampled_from(GRIDS), seed=st.integers(0, 2**32 - 1))
def test_fallback_is_bit_equal_to_pillow(
    size: tuple[int, int], grid: tuple[int, int], seed: int
) -> None:
    pixels = noise(*size, seed)
    got = by_numpy(pixels, columns=grid[0], rows=grid[1], tile_size=28)
    np.testing.assert_array_equal(got, by_pillow(pixels, *grid, 28))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_every_grid_of_up_to_forty_tiles(grid: tuple[int, int]) -> None:
    pixels = noise(173, 131, 7)
    got = ops.tile(pixels, columns=grid[0], rows=grid[1], tile_size=28, threads=2)
    np.testing.assert_array_equal(got, by_pillow(pixels, *grid, 28))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 5000), (1, 1)),
        ((5000, 1), (2, 1)),
        ((3000, 2000), (3, 2)),
        ((448, 448), (1, 1)),  # no pass at all
        ((896, 300), (2, 1)),  # no horizontal pass
        ((300, 896), (1, 2)),  # no vertical pass
        ((5, 5), (2, 2)),
    ],
)
def test_true_tile_size(size: tuple[int, int], grid: tuple[int, int]) -> None:
    pixels = noise(*size, 1)
    got = ops.tile(pixels, columns=grid[0], rows=grid[1])
    np.testing.assert_array_equal(got, by_pillow(pixels, *grid, 448))


STORED = json.loads(Path(__file__).with_name("pillow_tiles.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_stored_from_several_versions_of_pillow(case: Any, backend: str) -> None:
    expected = {version: hashes[case.name] for version, hashes in STORED.items()}
    assert len(expected) >= 4
    whole = ops.tile(
        case.pixels(), columns=1, rows=1, tile_size=case.side, thumbnail=False, threads=2
    )
    got = hashlib.sha256(whole.tobytes()).hexdigest()
    assert expected == dict.fromkeys(expected, got)


def test_golden_tiles(
    golden_images: dict[str, Image.Image], tile_arrays: dict[str, NDArray[Any]], backend: str
) -> None:
    for case in json.loads((GOLDEN / "tiles.json").read_text())["images"]:
        stem, limit = Path(case["file"]).stem, case["max_num"]
        pixels = np.asarray(golden_images[stem].convert("RGB"))
        height, width, _ = pixels.shape
        columns, rows = select_grid(width, height, max_tiles=limit, tile_size=56)
        got = ops.tile(pixels, columns=columns, rows=rows, tile_size=56)
        np.testing.assert_array_equal(got, tile_arrays[f"{stem}_tiles_u8"])
        if stem == "img0":
            values = ops.tile(pixels, columns=columns, rows=rows, tile_size=56, layout="nchw")
            stored = tile_arrays["img0_pixel_values_tiles_0_1_last"]
            np.testing.assert_array_max_ulp(values[[0, 1, -1]], stored, maxulp=1)


def test_every_pixel_value_normalises_to_the_same_bits(backend: str) -> None:
    """No resize: 16 x 16 pixels hold all 256 values; each step of the formula rounds to float32."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([values, values[::-1], values.T], -1)
    got = ops.tile(pixels, columns=1, rows=1, tile_size=16, layout="nchw")
    expected = ((pixels.astype(np.float32) / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_array_equal(got[0], expected)
    half = ops.tile(pixels, columns=1, rows=1, tile_size=16, layout="nchw", dtype="float16")
    np.testing.assert_array_equal(half[0], expected.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("side", "patch"), [(28, 14), (42, 14), (24, 4), (30, 5)])
def test_layouts_hold_the_normalised_tiles(backend: str, side: int, patch: int, dtype: str) -> None:
    pixels, grid = noise(91, 57, 3), {"columns": 3, "rows": 2, "tile_size": side}
    tiles = ops.tile(pixels, **grid)
    planes = ((tiles.astype(np.float32) / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2)
    nchw = ops.tile(pixels, layout="nchw", dtype=dtype, **grid)
    np.testing.assert_array_equal(nchw, planes.astype(dtype))
    got = ops.tile(pixels, layout="patches", patch_size=patch, dtype=dtype, **grid)
    g = side // patch
    assert got.shape == (7, g * g, 3 * patch * patch)
    for tile, row, column in np.ndindex(7, g, g):
        square = nchw[
            tile, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch
        ]
        np.testing.assert_array_equal(got[tile, row * g + column], square.ravel())


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (2, 2), (1, 1), (5, 70)])
def test_packed_formats(backend: str, size: tuple[int, int]) -> None:
    pixels = noise(*size, 5)
    options = {"columns": 2, "rows": 3, "tile_size": 28}
    expected = by_pillow(pixels, 2, 3, 28)
    alpha = np.concatenate([pixels, noise(*size, 6)[..., :1]], -1)
    padded = np.full((size[1], size[0] + 5, 3), 99, np.uint8)
    padded[:, : size[0]] = pixels
    reversed_rows = np.ascontiguousarray(pixels[::-1])[::-1]
    for image, name in (
        (np.ascontiguousarray(pixels[..., ::-1]), "bgr"),
        (alpha, "rgba"),
        (padded[:, : size[0]], "rgb"),
        (pixels[..., ::-1], "bgr"),
        (reversed_rows, "rgb"),
    ):
        got = ops.tile(image, pixel_format=name, **options)
        np.testing.assert_array_equal(got, expected, err_msg=f"{name} {image.strides}")


def _video(width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(9)
    chroma = ((height + 1) // 2, (width + 1) // 2 * 2)
    return rng.integers(0, 256, (height, width), np.uint8), rng.integers(0, 256, chroma, np.uint8)


@pytest.mark.parametrize(
    ("matrix", "kr", "kb"),
    [("bt601", 0.299, 0.114), ("bt709", 0.2126, 0.0722)],
)
def test_nv12_is_the_stated_matrix(backend: str, matrix: str, kr: float, kb: float) -> None:
    """Against ITU-R's formula in float64; fixed point may round the other way at a half."""
    luma, chroma = _video(32, 32)
    options = {"pixel_format": "nv12", "matrix": matrix}
    got = ops.tile((luma, chroma), columns=1, rows=1, tile_size=32, **options)
    y = (luma.astype(np.float64) - 16) / 219
    uv = (chroma.reshape(16, 16, 2).repeat(2, 0).repeat(2, 1) - 128.0) / 224
    r = y + 2 * (1 - kr) * uv[..., 1]
    b = y + 2 * (1 - kb) * uv[..., 0]
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    expected = (np.stack([r, g, b], -1) * 255).clip(0, 255)
    assert np.abs(got[0] - expected).max() <= 0.51


@pytest.mark.parametrize("size", [(64, 48), (37, 21), (1, 1), (2, 130)])
def test_nv12_is_converted_before_it_is_resized(backend: str, size: tuple[int, int]) -> None:
    luma, chroma = _video(*size)
    rgb = reference.to_rgb(planes_of((luma, chroma), "nv12"))
    options = {"columns": 3, "rows": 1, "tile_size": 28}
    expected = by_pillow(rgb, 3, 1, 28)
    np.testing.assert_array_equal(
        ops.tile((luma, chroma), pixel_format="nv12", **options), expected
    )
    pitched = np.zeros((size[1], size[0] + 9), np.uint8)
    pitched[:, : size[0]] = luma
    np.testing.assert_array_equal(
        ops.tile((pitched[:, : size[0]], chroma), pixel_format="nv12", **options), expected
    )
    if size[0] % 2 == size[1] % 2 == 0:
        one = np.concatenate([luma, chroma])
        np.testing.assert_array_equal(ops.tile(one, pixel_format="nv12", **options), expected)


def test_any_number_of_threads_and_a_given_array() -> None:
    pixels, options = noise(700, 500, 2), {"columns": 4, "rows": 3, "layout": "patches"}
    expected = ops.tile(pixels, threads=1, **options)
    out = np.full_like(expected, np.nan)
    for threads in (2, 3, 64):
        assert ops.tile(pixels, threads=threads, out=out, **options) is out
        np.testing.assert_array_equal(out, expected)


@settings(max_examples=200, deadline=None)
@given(size_in=st.integers(1, 5000), size_out=st.integers(1, 3000))
def test_sums_fit_in_32_bits(size_in: int, size_out: int) -> None:
    axis = axis_weights(size_in, size_out)
    largest = np.abs(axis.weights.astype(np.int64)).sum(1).max() * 255
    assert largest + (1 << (FRACTION_BITS - 1)) < 2**31
    assert (axis.low >= 0).all()
    assert (axis.count >= 1).all()
    assert (axis.low + axis.count <= size_in).all()
    assert (np.diff(axis.low) >= 0).all()
    assert (np.diff(axis.low + axis.count) >= 0).all()


def test_weights_are_computed_once() -> None:
    assert axis_weights(640, 1792) is axis_weights(640, 1792)
    with pytest.raises(ValueError, match="read-only"):
        axis_weights(640, 1792).weights[0, 0] = 1


PIXELS = np.zeros((8, 8, 3), np.uint8)
GRID = {"columns": 2, "rows": 1, "tile_size": 28}


@pytest.mark.parametrize(
    ("image", "options", "error", "text"),
    [
        (PIXELS, {"columns": 0}, ValueError, "columns is 0"),
        (PIXELS, {"rows": -1}, ValueError, "rows is -1"),
        (PIXELS, {"tile_size": 2**29, "columns": 40}, ValueError, "use fewer tiles"),
        (PIXELS, {"layout": "nhwc"}, ValueError, "one of tiles, nchw, patches"),
        (PIXELS, {"layout": "patches", "patch_size": 13}, ValueError, "multiple of patch_size 13"),
        (PIXELS, {"dtype": "float32"}, TypeError, "layout 'tiles' is uint8"),
        (PIXELS, {"layout": "nchw", "dtype": "int8"}, TypeError, "float32 or float16"),
        (PIXELS, {"threads": 0}, ValueError, "threads is 0"),
        (PIXELS, {"pixel_format": "yuyv"}, ValueError, "one of rgb, bgr, rgba, nv12"),
        (PIXELS, {"pixel_format": "rgba"}, ValueError, r"\(H, W, 4\)"),
        (PIXELS, {"matrix": "bt2020"}, ValueError, "one of bt601, bt709"),
        (PIXELS, {"out": np.empty((3, 28, 28), np.uint8)}, ValueError, r"expected uint8 \(3, 28"),
        (PIXELS.astype(np.float32), {}, TypeError, "uint8 array, not float32"),
        ("picture.png", {}, TypeError, "uint8 array, not str"),
        (PIXELS[:0], {}, ValueError, "8 x 0 pixels"),
        (PIXELS[..., 0], {}, ValueError, r"\(H, W, 3\)"),
        (PIXELS[:7, :, 0], {"pixel_format": "nv12"}, ValueError, "even sides"),
        ((PIXELS[..., 0], PIXELS[..., 0]), {"pixel_format": "nv12"}, ValueError, r"\(4, 8\)"),
    ],
)
def test_bad_arguments_say_what_to_do(
    image: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ops.tile(image, **(GRID | options))


def test_an_array_that_cannot_be_written_is_refused() -> None:
    out = np.empty((3, 28, 28, 3), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        ops.tile(PIXELS, out=out, **GRID)
