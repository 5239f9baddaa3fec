"""Pixel shuffle on the CPU: the moves exact, LayerNorm against float64, int8 within one step."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.kernels import ops, reference
from internvl_edge.kernels.jobs import ShuffleJob, ShufflePlan

EPS = 1e-5
LAYER_NORM_TOLERANCE = 1e-5
INT8_STEPS, INT8_SHARE = 1, 1e-3


@pytest.fixture(params=["library", "fallback"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the C++ library and with NumPy alone."""
    if request.param == "fallback":
        monkeypatch.setattr(ops, "cpu_kernels", lambda: None)
    elif ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    return str(request.param)


def with_class_token(patches: NDArray[Any]) -> NDArray[Any]:
    """`(tiles, rows, columns, C)` -> `(tiles, 1 + rows * columns, C)`, the first row poisoned."""
    tiles, rows, columns, channels = patches.shape
    flat = patches.reshape(tiles, rows * columns, channels)
    poison = np.full((tiles, 1, channels), 60000, patches.dtype)
    return np.concatenate([poison, flat], 1)


def features(tiles: int, rows: int, columns: int, channels: int, seed: int = 0) -> NDArray[Any]:
    """Like a vision tower's: off centre, and some channels far larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tiles, rows, columns, channels)) * 2 + 0.5
    x[..., :: max(channels // 3, 1)] *= 10
    return with_class_token(x.astype(np.float32))


def norm_weights(channels: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    return {
        "weight": rng.normal(1, 0.25, 4 * channels).astype(np.float32),
        "bias": rng.standard_normal(4 * channels).astype(np.float32),
    }


def in_float64(
    x: NDArray[Any], grid: tuple[int, int], version: str, norm: dict[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    """The whole kernel by its definition (spec, section 5), element by element where it moves."""
    (rows, columns), (tiles, _, channels) = grid, x.shape
    patches = x[:, 1:].astype(np.float64).reshape(tiles, rows, columns, channels)
    down, across = rows // 2, columns // 2
    shape = (tiles, down, across) if version == "v2" else (tiles, across, down)
    out = np.empty((*shape, 4 * channels))
    for i, j in np.ndindex(shape[1:]):
        for m in range(4):
            row, column = (i, j) if version == "v2" else (j, i)
            part = patches[:, 2 * row + m // 2, 2 * column + m % 2]
            out[:, i, j, m * channels : (m + 1) * channels] = part
    mean = out.mean(-1, keepdims=True)
    deviation = np.sqrt(((out - mean) ** 2).mean(-1, keepdims=True) + EPS)
    normed = (out - mean) / deviation * norm["weight"] + norm["bias"]
    return normed.reshape(tiles, down * across, 4 * channels)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("case", [0, 1])
def test_golden_shuffle_is_exact(backend: str, case: int, version: str, dtype: str) -> None:
    with np.load(GOLDEN / "pixel_shuffle.npz") as data:
        patches, expected = data[f"in{case}"], data[f"out{case}_{version}"]
    _, rows, columns, _ = patches.shape
    x = with_class_token(patches.astype(dtype))
    got = ops.pixel_shuffle(x, grid=(rows, columns), version=version)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected.reshape(got.shape))


sides = st.integers(1, 5).map(lambda half: 2 * half)


@settings(max_examples=80, deadline=None)
@given(
    tiles=st.integers(1, 3),
    rows=sides,
    columns=sides,
    channels=st.integers(1, 40),
    version=st.sampled_from(["v1", "v2"]),
    dtype=st.sampled_from(["float32", "float16"]),
    threads=st.integers(1, 3),
)
def test_layer_norm_against_float64(
    tiles: int, rows: int, columns: int, channels: int, version: str, dtype: str, threads: int
) -> None:
    x, norm = features(tiles, rows, columns, channels).astype(dtype), norm_weights(channels)
    options: dict[str, Any] = {"grid": (rows, columns), "version": version, **norm}
    expected = in_float64(x, (rows, columns), version, norm)
    got = ops.pixel_shuffle(x, dtype="float32", threads=threads, **options)
    np.testing.assert_allclose(got, expected, rtol=0, atol=LAYER_NORM_TOLERANCE)
    half = ops.pixel_shuffle(x, dtype="float16", threads=threads, **options)
    np.testing.assert_array_equal(half, got.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_true_width(backend: str, dtype: str) -> None:
    """4C = 12,800, as InternViT-6B has it."""
    x, norm = features(2, 8, 8, 3200).astype(dtype), norm_weights(3200)
    expected = in_float64(x, (8, 8), "v2", norm)
    got = ops.pixel_shuffle(x, dtype="float32", **norm)
    np.testing.assert_allclose(got, expected, rtol=0, atol=LAYER_NORM_TOLERANCE)
    scale = 0.03
    steps = np.rint(expected / scale).clip(-128, 127)
    quantised = ops.pixel_shuffle(x, scale=scale, **norm)
    assert quantised.dtype == np.int8
    off = np.abs(quantised - steps)
    assert off.max() <= INT8_STEPS
    assert (off > 0).mean() < INT8_SHARE
    assert {-128, 127} <= set(np.unique(quantised).tolist())  # saturated on both sides


def by_the_kernels_blocks(
    x: NDArray[Any], plan: ShufflePlan, norm: dict[str, NDArray[np.float32]]
) -> NDArray[Any]:
    """The CUDA kernel's blocks, thread by thread: `pixel_shuffle.cu` without its launch."""
    library = ops.cpu_kernels()
    if library is None:
        pytest.skip("no C++ compiler here")
    job, out = ShuffleJob(), np.empty(plan.shape, plan.dtype)
    plan.fill(job)
    job.input, job.out = x.ctypes.data, out.ctypes.data
    for name, array in norm.items():
        setattr(job, name, array.ctypes.data)
    assert library.ive_cpu_pixel_shuffle_blocks(ctypes.byref(job)) == 0
    return out


def aligned(array: NDArray[Any], offset: int) -> NDArray[Any]:
    """A copy `offset` elements behind a multiple of 64 bytes: 0 is read in packs, 1 one by one."""
    memory = np.empty(array.nbytes + 64 + offset * array.itemsize, np.uint8)
    begin = -memory.ctypes.data % 64 + offset * array.itemsize
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


@settings(max_examples=60, deadline=None)
@given(
    tiles=st.integers(1, 2),
    rows=sides,
    columns=sides,
    channels=st.one_of(st.integers(1, 40), st.sampled_from([64, 257, 520])),
    version=st.sampled_from(["v1", "v2"]),
    dtype=st.sampled_from(["float32", "float16"]),
    offset=st.sampled_from([0, 1]),
)
def test_the_cuda_kernels_sums_against_float64(
    tiles: int, rows: int, columns: int, channels: int, version: str, dtype: str, offset: int
) -> None:
    x = aligned(features(tiles, rows, columns, channels).astype(dtype), offset)
    norm = {name: aligned(a, offset) for name, a in norm_weights(channels).items()}
    plan = ShufflePlan.of(x.shape, x.dtype, (rows, columns), version, "float32", None, EPS)
    got = by_the_kernels_blocks(x, plan, norm)
    expected = in_float64(x, (rows, columns), version, norm)
    np.testing.assert_allclose(got, expected, rtol=0, atol=LAYER_NORM_TOLERANCE)
    moved = ShufflePlan.of(x.shape, x.dtype, (rows, columns), version, None, None, EPS)
    np.testing.assert_array_equal(
        by_the_kernels_blocks(x, moved, {}), reference.shuffle(x[:, 1:], rows, columns, version)
    )


@pytest.mark.parametrize("centre", [0, 10, 100, -1000])
@pytest.mark.parametrize("offset", [0, 1], ids=["packs", "one by one"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_cuda_kernels_sums_at_true_width(dtype: str, offset: int, centre: int) -> None:
    """12,800 elements over 256 threads, off centre by many deviations of most channels."""
    x = aligned((features(1, 8, 8, 3200) + centre).astype(dtype), offset)
    norm = {name: aligned(a, offset) for name, a in norm_weights(3200).items()}
    expected = in_float64(x, (8, 8), "v2", norm)
    plan = ShufflePlan.of(x.shape, x.dtype, None, "v2", "float32", None, EPS)
    got = by_the_kernels_blocks(x, plan, norm)
    np.testing.assert_allclose(got, expected, rtol=0, atol=LAYER_NORM_TOLERANCE)
    scale = 0.03
    plan = ShufflePlan.of(x.shape, x.dtype, None, "v2", None, scale, EPS)
    steps = np.rint(expected / scale).clip(-128, 127)
    off = np.abs(by_the_kernels_blocks(x, plan, norm) - steps)
    assert off.max() <= INT8_STEPS
    assert (off > 0).mean() < INT8_SHARE


def test_int8_rounds_half_to_even_and_saturates(backend: str) -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -1e9, -128.5, 0.49])
    x = with_class_token(np.tile(values.astype(np.float32), (1, 2, 2, 1)))
    got = ops.pixel_shuffle(x, scale=1.0)[0, 0, : len(values)]
    assert got.tolist() == [0, 2, 2, 0, -2, -2, 126, 127, 127, -128, -128, 0]


def test_half_precision_conversions_are_exact() -> None:
    """Every float16, through float32 and back, and float32 values around every rounding border."""
    if ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[~np.isnan(every)]
    x = with_class_token(np.resize(every, (1, 2, 2, 16128)))
    wide = ops.pixel_shuffle(x, dtype="float32")
    np.testing.assert_array_equal(wide.view(np.uint32), _moved(x).astype(np.float32).view("u4"))
    borders = every.astype(np.float32).view(np.uint32)[:, None] + np.array(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32
    )
    values = borders.view(np.float32).ravel()
    values = values[np.isfinite(values)]
    x = with_class_token(np.resize(values, (1, 2, 2, -(-len(values) // 4))))
    with np.errstate(over="ignore"):
        expected = _moved(x).astype(np.float16)
    got = ops.pixel_shuffle(x, dtype="float16")
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


def _moved(x: NDArray[Any]) -> NDArray[Any]:
    return reference.shuffle(x[:, 1:], 2, 2, "v2")


def test_a_given_array_and_a_view() -> None:
    x = features(4, 4, 4, 8)
    expected = ops.pixel_shuffle(np.ascontiguousarray(x[::2]))
    out = np.empty_like(expected)
    assert ops.pixel_shuffle(x[::2], out=out) is out
    np.testing.assert_array_equal(out, expected)


X = features(1, 4, 4, 8)
NORM = norm_weights(8)


@pytest.mark.parametrize(
    ("x", "options", "error", "text"),
    [
        (X.astype(np.float64), {}, TypeError, "float32 or float16, not float64"),
        (X[0], {}, ValueError, r"not \(17, 8\)"),
        (X[:, :16], {}, ValueError, "16 tokens are not"),
        (X, {"grid": (2, 4)}, ValueError, "pass grid="),
        (X, {"grid": (1, 16)}, ValueError, "even sides"),
        (X, {"version": "v3"}, ValueError, "one of v2, v1"),
        (X, {"dtype": "int8"}, ValueError, "needs a scale"),
        (X, {"dtype": "int16"}, TypeError, "not int16"),
        (X, {"scale": 0.5, "dtype": "float16"}, ValueError, "only it takes one"),
        (X, {"scale": 0.0}, ValueError, "positive and finite"),
        (X, {"scale": float("nan")}, ValueError, "positive and finite"),
        (X, {"weight": NORM["weight"]}, ValueError, "go together"),
        (X, {"weight": NORM["weight"][:8], "bias": NORM["bias"]}, ValueError, r"\(32,\)"),
        (X, {"out": np.empty((1, 4, 32), np.float16)}, ValueError, "expected float32"),
        (X, {"threads": -2}, ValueError, "threads is -2"),
    ],
)
def test_bad_arguments_say_what_to_do(
    x: NDArray[Any], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ops.pixel_shuffle(x, **options)


def test_plan_gives_the_tokens_of_a_tile() -> None:
    plan = ShufflePlan.of((41, 1025, 3200), np.float16, None, "v2", None, None, EPS)
    assert plan.shape == (41, 256, 12800)
