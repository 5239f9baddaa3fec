"""What `kernels/cuda.py` asks of the driver, with a stand-in whose device memory is host memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
from host_driver import HostDriver, open_driver

from internvl_edge.kernels import cuda, ops
from internvl_edge.kernels.device import CudaError, DeviceArray, Driver, Scratch, stream_handle


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[cuda.CudaKernels, HostDriver]:
    if ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")

    def binary(source: str) -> Path:
        path = tmp_path / source
        path.write_text(source)
        return path

    monkeypatch.setattr(cuda, "cuda_binary", binary)
    driver, bindings = open_driver()
    return cuda.CudaKernels(driver), bindings


Kernels = tuple[cuda.CudaKernels, HostDriver]
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
GRID: dict[str, Any] = {"columns": 3, "rows": 2, "tile_size": 28}


def interrupt() -> None:
    raise KeyboardInterrupt


def empty(kernels: cuda.CudaKernels, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    return DeviceArray(kernels.driver, shape, dtype)


@pytest.mark.parametrize(
    ("layout", "dtype", "shape"),
    [
        ("tiles", "uint8", (7, 28, 28, 3)),
        ("nchw", "float32", (7, 3, 28, 28)),
        ("nchw", "float16", (7, 3, 28, 28)),
        ("patches", "float32", (7, 4, 588)),
        ("patches", "float16", (7, 4, 588)),
    ],
)
def test_tiling_of_a_device_array(
    kernels: Kernels, layout: str, dtype: str, shape: tuple[int, ...]
) -> None:
    cuda_kernels, bindings = kernels
    out = empty(cuda_kernels, shape, dtype)
    image = DeviceArray.of(cuda_kernels.driver, PIXELS)
    got = cuda_kernels.tile(image, out=out, layout=layout, dtype=dtype, stream=5, **GRID)
    assert got is out
    np.testing.assert_array_equal(
        out.to_host(), ops.tile(PIXELS, layout=layout, dtype=dtype, **GRID)
    )
    (first, second) = bindings.named("cuLaunchKernel")
    short = {"uint8": "u8", "float32": "f32", "float16": "f16"}[dtype]
    assert [first[0], second[0]] == ["ive_tile_horizontal", f"ive_tile_{layout}_{short}"]
    assert first[1:9] == (1, 50, 1, 128, 1, 1, 0, 5)
    assert second[1:9] == (1, 28, 21, 128, 1, 1, 0, 5)


def test_modules_weights_and_scratch_are_made_once(kernels: Kernels) -> None:
    cuda_kernels, bindings = kernels
    out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
    image = DeviceArray.of(cuda_kernels.driver, PIXELS)
    cuda_kernels.tile(image, out=out, **GRID)
    before = [len(bindings.named(name)) for name in ("cuModuleLoadData", "cuMemAlloc")]
    cuda_kernels.tile(image, out=out, **GRID)
    after = [len(bindings.named(name)) for name in ("cuModuleLoadData", "cuMemAlloc")]
    assert before == after == [1, 2 + 4 * 3 + 1]  # out, image; four axes of three; scratch


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_scratch_is_memory_whenever_it_is_interrupted() -> None:
    """What was freed on the way to more is not given out again."""
    for at in range(1, 300):
        driver, bindings = open_driver()
        scratch = Scratch(driver)
        scratch.get(7, 5, 10)
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            scratch.get(7, 5, 20)
        for size in (5, 30, 20):
            assert bindings.memory[scratch.get(7, 5, size)].nbytes >= size
        if counted.seen < at:
            break
    assert 10 < at < 299
    del scratch
    assert bindings.memory == {}


def test_both_kinds_of_weights_on_one_device(kernels: Kernels) -> None:
    """What is cached of an axis is cached under its kind too."""
    cuda_kernels, _ = kernels
    out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
    expected = [ops.tile(PIXELS, short_weights=short, **GRID) for short in (False, True)]
    assert (expected[0] != expected[1]).any()
    for short in (False, True, False):
        cuda_kernels.tile(PIXELS, out=out, short_weights=short, **GRID)
        np.testing.assert_array_equal(out.to_host(), expected[short])


def test_weights_are_dropped_when_there_are_many(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_kernels, bindings = kernels
    monkeypatch.setattr(cuda, "CACHED_AXES", 4)
    out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
    for width in range(40, 60):
        pixels = np.ascontiguousarray(PIXELS[:, :width])
        image = DeviceArray.of(cuda_kernels.driver, pixels)
        cuda_kernels.tile(image, out=out, **GRID)
        np.testing.assert_array_equal(out.to_host(), ops.tile(pixels, **GRID))
        image.free()
    assert len(bindings.memory) == 1 + 4 * 3 + 1


def test_pinned_memory_is_read_in_place_and_other_memory_copied(kernels: Kernels) -> None:
    cuda_kernels, bindings = kernels
    out, expected = empty(cuda_kernels, (7, 28, 28, 3), "uint8"), ops.tile(PIXELS, **GRID)
    cuda_kernels.tile(PIXELS, out=out, stream=3, **GRID)
    np.testing.assert_array_equal(out.to_host(), expected)
    ((_, _, size, stream),) = bindings.named("cuMemcpyHtoDAsync")
    assert (size, stream) == (PIXELS.nbytes, 3)
    bindings.pinned[PIXELS.ctypes.data] = PIXELS
    cuda_kernels.tile(PIXELS, out=out, stream=3, **GRID)
    np.testing.assert_array_equal(out.to_host(), expected)
    assert len(bindings.named("cuMemcpyHtoDAsync")) == 1


def test_nv12_on_host_and_device(kernels: Kernels) -> None:
    cuda_kernels, _ = kernels
    image = np.random.default_rng(1).integers(0, 256, (72, 40), dtype=np.uint8)
    expected = ops.tile(image, pixel_format="nv12", matrix="bt709", **GRID)
    planes = (
        DeviceArray.of(cuda_kernels.driver, image[:48]),
        DeviceArray.of(cuda_kernels.driver, image[48:]),
    )
    for given in (image, (image[:48], image[48:]), planes):
        out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
        cuda_kernels.tile(given, out=out, pixel_format="nv12", matrix="bt709", **GRID)
        np.testing.assert_array_equal(out.to_host(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_pixel_shuffle(kernels: Kernels, dtype: str) -> None:
    cuda_kernels, bindings = kernels
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 17, 3200), np.float32)
    norm = {name: rng.standard_normal(12800, np.float32) for name in ("weight", "bias")}
    options: dict[str, Any] = {"version": "v1", "dtype": dtype}
    options["scale"] = 0.05 if dtype == "int8" else None
    out = empty(cuda_kernels, (2, 4, 12800), dtype)
    on_device = {name: DeviceArray.of(cuda_kernels.driver, a) for name, a in norm.items()}
    source = DeviceArray.of(cuda_kernels.driver, x)
    cuda_kernels.pixel_shuffle(source, out=out, stream=9, **on_device, **options)
    expected = ops.pixel_shuffle(x, **norm, **options).astype(np.float32)
    # One rounding of the output's type: the kernel sums in another order than the CPU library.
    atol = {"float32": 1e-5, "float16": np.spacing(np.float16(8)), "int8": 1}[dtype]
    np.testing.assert_allclose(out.to_host().astype(np.float32), expected, rtol=0, atol=atol)
    ((name, *shape),) = bindings.named("cuLaunchKernel")
    assert name.startswith("ive_pixel_shuffle_f32_")
    assert shape[:8] == [8, 1, 1, 256, 1, 1, 51200, 9]
    assert bindings.named("cuFuncSetAttribute") == [(name, "dynamic shared", 51200)]


@pytest.mark.parametrize(
    ("interface", "producer"),
    [({"stream": 4}, 4), ({"stream": 1}, 1), ({"version": 2}, 1)],  # torch's version is 2
    ids=["another", "the default", "not told"],
)
def test_work_on_another_stream_is_waited_for_by_the_device(
    kernels: Kernels, interface: dict[str, int], producer: int
) -> None:
    cuda_kernels, bindings = kernels
    image = DeviceArray.of(cuda_kernels.driver, np.zeros_like(PIXELS))
    produced = SimpleNamespace(__cuda_array_interface__=image.__cuda_array_interface__ | interface)
    out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
    bindings.calls.clear()
    # The picture is still on its way, on its own stream.
    pixels = np.ascontiguousarray(PIXELS)
    bindings.do_cuMemcpyHtoDAsync(image.address, pixels.ctypes.data, pixels.nbytes, producer)
    cuda_kernels.tile(produced, out=out, stream=6, **GRID)
    bindings.drain(6)
    np.testing.assert_array_equal(out.to_host(), ops.tile(PIXELS, **GRID))
    recorded, waiting = bindings.named("cuEventRecord", "cuStreamWaitEvent")
    assert (recorded[1], waiting[0]) == (producer, 6)


def test_work_on_the_same_stream_is_not_waited_for(kernels: Kernels) -> None:
    cuda_kernels, bindings = kernels
    image = DeviceArray.of(cuda_kernels.driver, PIXELS)
    out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
    for stream, said in ((4, 4), (0, 1)):
        interface = image.__cuda_array_interface__ | {"stream": said}
        produced = SimpleNamespace(__cuda_array_interface__=interface)
        cuda_kernels.tile(produced, out=out, stream=stream, **GRID)
    assert bindings.named("cuEventRecord", "cuStreamWaitEvent") == []


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (None, 0),
        (12, 12),
        (SimpleNamespace(cuda_stream=13), 13),  # torch
        (SimpleNamespace(ptr=14), 14),  # CuPy
        (SimpleNamespace(handle=15), 15),  # PyCUDA
        (SimpleNamespace(__cuda_stream__=lambda: (0, 16)), 16),  # cuda.core
        (SimpleNamespace(__cuda_stream__=(0, 17)), 17),
    ],
)
def test_streams_of_every_framework(stream: Any, handle: int) -> None:
    assert stream_handle(stream) == handle


def test_mistakes_say_what_to_do(kernels: Kernels) -> None:
    cuda_kernels, _ = kernels
    out = empty(cuda_kernels, (7, 28, 28, 3), "uint8")
    wide = DeviceArray.of(cuda_kernels.driver, PIXELS)
    gaps = SimpleNamespace(
        __cuda_array_interface__=wide.__cuda_array_interface__
        | {"shape": (50, 35, 3), "strides": (210, 6, 1)}
    )
    x = DeviceArray.of(cuda_kernels.driver, np.zeros((1, 17, 8), np.float16))
    norm = DeviceArray.of(cuda_kernels.driver, np.zeros(32, np.float16))
    tokens = empty(cuda_kernels, (1, 4, 32), "float16")
    with pytest.raises(TypeError, match="device array"):
        cuda_kernels.tile(PIXELS, out=np.empty((7, 28, 28, 3), np.uint8), **GRID)
    with pytest.raises(ValueError, match="expected uint8"):
        cuda_kernels.tile(PIXELS, out=tokens, **GRID)
    with pytest.raises(ValueError, match="multiple of 4"):
        cuda_kernels.tile(PIXELS, out=out, columns=3, rows=2, tile_size=30)
    with pytest.raises(ValueError, match="copy the image first"):
        cuda_kernels.tile(gaps, out=out, **GRID)
    with pytest.raises(TypeError, match="str is no device array"):
        cuda_kernels.tile("image", out=out, **GRID)
    with pytest.raises(TypeError, match="must be float32"):
        cuda_kernels.pixel_shuffle(x, out=tokens, weight=norm, bias=norm)
    with pytest.raises(TypeError, match="a stream is"):
        cuda_kernels.pixel_shuffle(x, out=tokens, stream="0x12")


class Status(IntEnum):
    CUDA_ERROR_OUT_OF_MEMORY = 2


def test_a_failing_call_is_named() -> None:
    driver = Driver(SimpleNamespace(cuMemAlloc=lambda size: (Status(2), 0)))
    with pytest.raises(CudaError, match=r"cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        driver("cuMemAlloc", 1)


def test_without_a_driver_the_error_asks_for_one() -> None:
    def init(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    driver = Driver(SimpleNamespace(cuInit=init))
    with pytest.raises(CudaError, match=r"libcuda.so.1; install an NVIDIA driver"):
        driver("cuInit", 0)


def test_without_bindings_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CudaError, match="pip install"):
        cuda.CudaKernels.open()
