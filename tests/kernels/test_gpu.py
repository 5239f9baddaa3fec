"""The CUDA build against the CPU build, on a GPU: same bits in tiles, same rounding in the norm.

pytest -m gpu tests/kernels
compute-sanitizer --error-exitcode 1 --tool memcheck  python -m pytest -m gpu tests/kernels
compute-sanitizer --error-exitcode 1 --tool racecheck python -m pytest -m gpu tests/kernels
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from internvl_edge.kernels import ops
from internvl_edge.kernels.build import CUDA_SOURCES, BuildError, cuda_binary
from internvl_edge.kernels.cuda import CudaKernels, read_candidates, select_scratch
from internvl_edge.kernels.device import CudaError, DeviceArray
from internvl_edge.kernels.jobs import ShuffleJob, ShufflePlan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("the_gpu")]


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    try:
        cuda_kernels = CudaKernels.open()
        for source in CUDA_SOURCES:
            cuda_binary(source)
    except (CudaError, BuildError) as error:
        pytest.skip(f"no GPU to test on: {str(error).splitlines()[0]}")
    return cuda_kernels


def noise(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (333, 1777), (3840, 2160)])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("tiles", "uint8"),
        ("nchw", "float32"),
        ("nchw", "float16"),
        ("patches", "float32"),
        ("patches", "float16"),
    ],
)
def test_tiles_are_bit_equal_to_the_cpu(
    kernels: CudaKernels, size: tuple[int, int], layout: str, dtype: str
) -> None:
    pixels = noise(size[1], size[0], 3)
    options: dict[str, Any] = {"columns": 4, "rows": 3, "layout": layout, "dtype": dtype}
    expected = ops.tile(pixels, **options)
    out = DeviceArray(kernels.driver, expected.shape, dtype)
    for image in (pixels, DeviceArray.of(kernels.driver, pixels)):
        kernels.tile(image, out=out, **options)
        np.testing.assert_array_equal(out.to_host(), expected)
    out.free()


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (333, 1777)])
def test_tiles_of_short_weights(kernels: CudaKernels, size: tuple[int, int]) -> None:
    pixels = noise(size[1], size[0], 3)
    out = DeviceArray(kernels.driver, (13, 448, 448, 3), "uint8")
    for short in (False, True):
        options: dict[str, Any] = {"columns": 4, "rows": 3, "short_weights": short}
        kernels.tile(pixels, out=out, **options)
        np.testing.assert_array_equal(out.to_host(), ops.tile(pixels, **options))
    out.free()


@pytest.mark.parametrize("pixel_format", ["bgr", "rgba", "nv12"])
def test_formats(kernels: CudaKernels, pixel_format: str) -> None:
    shape = {"bgr": (90, 70, 3), "rgba": (90, 70, 4), "nv12": (135, 70)}[pixel_format]
    image, options = noise(*shape), {"columns": 2, "rows": 3, "pixel_format": pixel_format}
    expected = ops.tile(image, **options)
    out = DeviceArray(kernels.driver, expected.shape, "uint8")
    kernels.tile(image, out=out, **options)
    np.testing.assert_array_equal(out.to_host(), expected)


@pytest.mark.parametrize("given", ["float32", "float16"])
@pytest.mark.parametrize("channels", [3200, 1024, 19])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle(kernels: CudaKernels, given: str, channels: int, version: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 1025, channels), np.float32).astype(given)
    norm = {name: rng.standard_normal(4 * channels, np.float32) for name in ("weight", "bias")}
    source = DeviceArray.of(kernels.driver, x)
    weights = {name: DeviceArray.of(kernels.driver, a) for name, a in norm.items()}
    plain = ops.pixel_shuffle(x, version=version)
    out = DeviceArray(kernels.driver, plain.shape, given)
    kernels.pixel_shuffle(source, out=out, version=version)
    np.testing.assert_array_equal(out.to_host(), plain)
    out = DeviceArray(kernels.driver, plain.shape, "float32")
    kernels.pixel_shuffle(source, out=out, version=version, dtype="float32", **weights)
    expected = ops.pixel_shuffle(x, version=version, dtype="float32", **norm)
    np.testing.assert_allclose(out.to_host(), expected, rtol=0, atol=1e-5)
    steps = DeviceArray(kernels.driver, plain.shape, "int8")
    kernels.pixel_shuffle(source, out=steps, version=version, scale=0.03, **weights)
    # In int16: the difference of two int8 would wrap.
    off = np.abs(
        steps.to_host().astype(np.int16) - ops.pixel_shuffle(x, version=version, scale=0.03, **norm)
    )
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1024, 1025, 16_384, 16_385, 92_553, 3_000_001])
@pytest.mark.parametrize("count", [1, 64])
def test_selection(kernels: CudaKernels, size: int, dtype: str, count: int) -> None:
    """NumPy's order: among normal logits, ties, infinities and NaN."""
    rng = np.random.default_rng(size)
    out = DeviceArray(kernels.driver, (count,), "uint64")
    scratch = DeviceArray(kernels.driver, (select_scratch(size, count),), "uint64")
    rows = [rng.standard_normal(size), rng.integers(0, 3, size), np.full(size, -np.inf)]
    rows.append(np.where(rng.random(size) < 1e-3, np.inf, rows[0]))
    rows.append(np.where(rng.random(size) < 1e-4, np.nan, rows[3]))
    for row in rows:
        logits = row.astype(dtype)
        nan = np.isnan(logits)
        values = np.where(nan, 0, logits.astype(np.float64))
        expected = np.lexsort((np.arange(size), -values, ~nan))[:count]
        source = DeviceArray.of(kernels.driver, logits)
        for _ in range(3):  # over the scratch memory of the last
            kernels.select(source, out=out, scratch=scratch)
            ids, found = read_candidates(out.to_host())
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_array_equal(found, logits[ids].astype(np.float32))


def test_the_kernels_blocks_run_on_the_cpu_do_the_same(kernels: CudaKernels) -> None:
    """What the CPU's emulation of a block promises, the device keeps: only fused multiply-adds
    may round otherwise."""
    library = ops.cpu_kernels()
    if library is None:
        pytest.skip("no C++ compiler here")
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 1025, 3200), np.float32).astype(np.float16)
    norm = {name: rng.standard_normal(12800, np.float32) for name in ("weight", "bias")}
    plan = ShufflePlan.of(x.shape, x.dtype, None, "v2", "float32", None, 1e-5)
    job, expected = ShuffleJob(), np.empty(plan.shape, plan.dtype)
    plan.fill(job)
    job.input, job.out = x.ctypes.data, expected.ctypes.data
    job.weight, job.bias = norm["weight"].ctypes.data, norm["bias"].ctypes.data
    assert library.ive_cpu_pixel_shuffle_blocks(ctypes.byref(job)) == 0
    out = DeviceArray(kernels.driver, plan.shape, "float32")
    weights = {name: DeviceArray.of(kernels.driver, a) for name, a in norm.items()}
    kernels.pixel_shuffle(DeviceArray.of(kernels.driver, x), out=out, dtype="float32", **weights)
    np.testing.assert_allclose(out.to_host(), expected, rtol=0, atol=2e-6)
