"""Index arithmetic and launch shapes of the CUDA kernels, on the CPU through the same bodies."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.kernels import build, cuda, ops
from internvl_edge.kernels.images import planes_of
from internvl_edge.kernels.jobs import (
    LAYOUTS,
    LaunchShape,
    ShuffleJob,
    ShufflePlan,
    TileJob,
    TilePlan,
)

I32, I64, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
BEYOND = 2**31


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ops.cpu_kernels()
    if loaded is None:
        pytest.skip("no C++ compiler here")
    loaded.ive_cpu_output_index.argtypes = [I32, I32, I32, I64, I32, I32, I32]
    loaded.ive_cpu_scratch_index.argtypes = [POINTER, I32, I32, I64, I64]
    loaded.ive_cpu_source_index.argtypes = [POINTER, I64, I32]
    for name in ("output", "scratch", "source"):
        getattr(loaded, f"ive_cpu_{name}_index").restype = I64
    for name in ("tile_shapes", "shuffle_shape"):
        getattr(loaded, f"ive_cpu_{name}").argtypes = [POINTER, POINTER]
        getattr(loaded, f"ive_cpu_{name}").restype = None
    return loaded


def tile_plan(columns: int, rows: int, side: int = 448, **options: Any) -> TilePlan:
    defaults = {"patch_size": 14, "thumbnail": True, "layout": "nchw", "dtype": None}
    return TilePlan.of(columns=columns, rows=rows, tile_size=side, **(defaults | options))


def shuffle_job(tiles: int, rows: int, columns: int, channels: int, version: str) -> ShuffleJob:
    job = ShuffleJob()
    shape = (tiles, 1 + rows * columns, channels)
    ShufflePlan.of(shape, np.float32, (rows, columns), version, None, None, 1e-5).fill(job)
    return job


@settings(max_examples=300, deadline=None)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    tile=st.integers(0, 2**40),
    c=st.integers(0, 2),
    y=st.integers(0, 447),
    x=st.integers(0, 447),
)
def test_output_index_by_shape(
    library: ctypes.CDLL, layout: str, tile: int, c: int, y: int, x: int
) -> None:
    got = library.ive_cpu_output_index(LAYOUTS[layout], 448, 14, tile, c, y, x)
    within = {
        "tiles": np.ravel_multi_index((y, x, c), (448, 448, 3)),
        "nchw": np.ravel_multi_index((c, y, x), (3, 448, 448)),
        "patches": np.ravel_multi_index((y // 14, x // 14, c, y % 14, x % 14), (32, 32, 3, 14, 14)),
    }
    assert got == tile * 3 * 448 * 448 + int(within[layout])


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_output_index_is_one_to_one(library: ctypes.CDLL, layout: str) -> None:
    everywhere = [
        library.ive_cpu_output_index(LAYOUTS[layout], 28, 14, tile, c, y, x)
        for tile, c, y, x in np.ndindex(3, 3, 28, 28)
    ]
    assert sorted(everywhere) == list(range(3 * 3 * 28 * 28))


def test_indices_pass_two_to_the_31(library: ctypes.CDLL) -> None:
    tiles = 4000  # x 602,112 elements
    last = library.ive_cpu_output_index(LAYOUTS["nchw"], 448, 14, tiles - 1, 2, 447, 447)
    assert last == tiles * 3 * 448 * 448 - 1 > BEYOND
    job = shuffle_job(41, 32, 32, 3200, "v2")
    elements = 41 * 1025 * 3200
    assert library.ive_cpu_source_index(ctypes.byref(job), 41 * 256 - 1, 12799) == elements - 1
    job = shuffle_job(700, 32, 32, 3200, "v2")
    got = library.ive_cpu_source_index(ctypes.byref(job), 700 * 256 - 1, 12799)
    assert got == 700 * 1025 * 3200 - 1 > BEYOND
    tile = TileJob()
    tile_plan(40, 1).fill(tile)
    tile.image.width, tile.image.height = 60000, 60000
    end = library.ive_cpu_scratch_index(ctypes.byref(tile), 1, 2, 59999, 447)
    assert end + 1 == cuda.scratch_bytes(60000, tile_plan(40, 1)) > BEYOND


@settings(max_examples=100, deadline=None)
@given(
    tiles=st.integers(1, 3),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    channels=st.integers(1, 5),
    version=st.sampled_from(["v1", "v2"]),
)
def test_source_index_visits_every_patch_once(
    library: ctypes.CDLL, tiles: int, down: int, across: int, channels: int, version: str
) -> None:
    job = shuffle_job(tiles, 2 * down, 2 * across, channels, version)
    got = [
        library.ive_cpu_source_index(ctypes.byref(job), token, m)
        for token, m in np.ndindex(tiles * down * across, 4 * channels)
    ]
    sequence = 1 + 4 * down * across
    whole = np.arange(tiles * sequence * channels).reshape(tiles, sequence, channels)
    assert sorted(got) == whole[:, 1:].ravel().tolist()
    expected = ops.reference.shuffle(whole[:, 1:], 2 * down, 2 * across, version)
    assert got == expected.ravel().tolist()


def _numbers(shape: LaunchShape) -> tuple[int, int, int, int]:
    return (shape.x, shape.y, shape.z, shape.threads)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 200_000),
    columns=st.integers(1, 3000),
    rows=st.integers(1, 3000),
    side=st.sampled_from([4, 28, 448, 896]),
)
def test_python_launches_what_cpp_launches(
    library: ctypes.CDLL, height: int, columns: int, rows: int, side: int
) -> None:
    plan, job, shapes = tile_plan(columns, rows, side, patch_size=4), TileJob(), (LaunchShape * 2)()
    plan.fill(job)
    job.image.height = height
    library.ive_cpu_tile_shapes(ctypes.byref(job), shapes)
    first, second = cuda.tile_shapes(height, plan)
    assert _numbers(shapes[0]) == _numbers(first)
    assert _numbers(shapes[1]) == _numbers(second)
    for shape in shapes:
        assert 1 <= shape.x < BEYOND
        assert 1 <= shape.y <= 65535
        assert 1 <= shape.z <= 65535
    assert first.x * first.threads >= (columns + int(plan.thumbnail)) * side
    assert second.x * second.threads * 4 >= side


@pytest.mark.parametrize("tiles", [1, 41, 30000])
def test_a_block_for_every_token(library: ctypes.CDLL, tiles: int) -> None:
    job, shape = shuffle_job(tiles, 32, 32, 3200, "v2"), LaunchShape()
    library.ive_cpu_shuffle_shape(ctypes.byref(job), ctypes.byref(shape))
    plan = ShufflePlan.of((tiles, 1025, 3200), np.float16, None, "v2", None, None, 1e-5)
    assert _numbers(shape) == _numbers(cuda.shuffle_shape(plan))
    assert shape.x == tiles * 256 < BEYOND


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    side=st.sampled_from([4, 28, 56]),
    layout=st.sampled_from(["tiles", "nchw", "patches"]),
    half=st.booleans(),
    pixel_format=st.sampled_from(["rgb", "bgr", "rgba", "nv12"]),
    thumbnail=st.booleans(),
)
def test_the_kernels_bodies_do_what_the_cpu_library_does(
    library: ctypes.CDLL,
    width: int,
    height: int,
    columns: int,
    rows: int,
    side: int,
    layout: str,
    half: bool,
    pixel_format: str,
    thumbnail: bool,
) -> None:
    """Every CUDA thread's work, one after the other, through device-shaped scratch memory."""
    image = picture(width, height, pixel_format)
    dtype = None if layout == "tiles" else ("float16" if half else "float32")
    options: dict[str, Any] = {"layout": layout, "dtype": dtype, "thumbnail": thumbnail}
    plan = tile_plan(columns, rows, side, patch_size=4, **options)
    planes, got = planes_of(image, pixel_format), np.empty(plan.shape, plan.dtype)
    job, _alive = ops.tile_job(planes, plan, got)
    scratch = np.empty(cuda.scratch_bytes(height, plan), np.uint8)
    job.scratch = scratch.ctypes.data
    assert library.ive_cpu_tile_elements(ctypes.byref(job)) == 0
    expected = ops.tile(
        image,
        columns=columns,
        rows=rows,
        tile_size=side,
        patch_size=4,
        pixel_format=pixel_format,
        **options,
    )
    np.testing.assert_array_equal(got, expected)


def picture(width: int, height: int, pixel_format: str) -> Any:
    rng = np.random.default_rng(width * 1000 + height)
    if pixel_format == "nv12":
        chroma = ((height + 1) // 2, (width + 1) // 2 * 2)
        return (
            rng.integers(0, 256, (height, width), np.uint8),
            rng.integers(0, 256, chroma, np.uint8),
        )
    channels = 4 if pixel_format == "rgba" else 3
    return rng.integers(0, 256, (height, width, channels), np.uint8)


SANITIZED = Path(__file__).with_name("sanitized.py")


@pytest.mark.slow(seconds=2)
def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    try:
        runtime = subprocess.check_output([compiler, "-print-file-name=libasan.so"], text=True)
    except OSError:
        pytest.skip(f"no {compiler} here")
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("this compiler has no address sanitizer")
    flags = (
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
        "-O1",
        "-g",
    )
    library = build.cpu_library(flags)
    environment = os.environ | {
        "LD_PRELOAD": runtime.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory until it ends
        "PYTHONMALLOC": "malloc",  # NumPy's arrays get red zones of their own
    }
    command = [sys.executable, str(SANITIZED), str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"
    broken = subprocess.run(
        [*command, "overrun"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "heap-buffer-overflow" in broken.stderr  # the check can fail
