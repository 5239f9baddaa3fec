"""The backends' `cuda` with a stand-in whose streams do their work when they are waited for."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
from host_driver import CONTEXT, FOREIGN_CONTEXT, HostDriver

from internvl_edge.kernels.cuda import CudaKernels
from internvl_edge.kernels.device import DeviceArray, Driver
from internvl_edge.runtime import DeviceError
from internvl_edge.runtime.backends.cuda import Cuda, Graph

pytestmark = pytest.mark.slow(seconds=1)

VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def bindings() -> HostDriver:
    return HostDriver()


@pytest.fixture
def cuda(bindings: HostDriver) -> Cuda:
    return Cuda(Driver(bindings, DeviceError))


def test_copies_are_queued_and_there_after_a_wait(cuda: Cuda, bindings: HostDriver) -> None:
    source = cuda.pinned(VALUES.shape, "float32")
    source[:] = VALUES
    target, back = cuda.empty(VALUES.shape, "float32"), np.zeros_like(VALUES)
    cuda.upload(source, target)
    cuda.download(target, back)
    assert not back.any()  # the stand-in waits to be waited for
    cuda.synchronize()
    np.testing.assert_array_equal(back, VALUES)
    for call in bindings.named("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"):
        assert call[2:] == (VALUES.nbytes, cuda.stream)


def test_pageable_memory_may_change_after_its_upload(cuda: Cuda) -> None:
    source, target = VALUES.copy(), cuda.empty(VALUES.shape, "float32")
    cuda.upload(source, target)
    source[:] = -1
    np.testing.assert_array_equal(target.to_host(), VALUES)


def test_zeros_are_zero(cuda: Cuda) -> None:
    assert np.isnan(cuda.empty((3,), "float32").to_host()).all()  # the stand-in's new memory
    assert not cuda.zeros((3, 5), "float16").to_host().any()


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "int64"])
def test_parts_are_the_same_memory(cuda: Cuda, dtype: str) -> None:
    values = np.arange(60).reshape(5, 3, 4).astype(dtype)
    whole = DeviceArray.of(cuda.driver, values)
    for rows in (slice(1, 3), slice(0, 5), slice(4, None), slice(2, 2), slice(-2, None)):
        part = whole[rows]
        assert part.shape == values[rows].shape
        np.testing.assert_array_equal(part.to_host(), values[rows])
    np.testing.assert_array_equal(whole.of_shape((15, 4)).to_host(), values.reshape(15, 4))
    inner = whole[1:4][1:2]
    cuda.upload(np.zeros((1, 3, 4), dtype), inner)
    assert not whole.to_host()[2].any()
    with pytest.raises(ValueError, match="neighbours"):
        whole[::2]
    with pytest.raises(ValueError, match="sizes differ"):
        whole.of_shape((5, 5))


def test_a_part_keeps_the_whole(cuda: Cuda, bindings: HostDriver) -> None:
    part = cuda.zeros((4, 2), "float32")[1:][1:]
    gc.collect()
    assert len(bindings.memory) == 1
    assert not part.to_host().any()
    del part
    assert bindings.memory == {}


def test_everything_is_given_back(bindings: HostDriver) -> None:
    cuda = Cuda(Driver(bindings, DeviceError))
    held: list[Any] = [cuda.empty((4,), "uint8"), cuda.pinned((0, 4), "uint8"), cuda.event()]
    with cuda.capture() as graph:
        pass
    held.append(graph)
    stream = cuda.stream
    del held, graph, cuda
    gc.collect()
    assert bindings.memory == bindings.pinned == {}
    given = ("cuEventDestroy", "cuGraphDestroy", "cuGraphExecDestroy")
    assert [len(bindings.named(name)) for name in given] == [1, 1, 1]
    assert bindings.named("cuStreamDestroy") == [(stream,)]
    assert bindings.current == [CONTEXT]


def test_freeing_by_hand_frees_once(cuda: Cuda, bindings: HostDriver) -> None:
    array = cuda.empty((4,), "uint8")
    array.free()
    array.free()
    del array
    assert len(bindings.named("cuMemFree")) == 1


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (12, 12),
        (SimpleNamespace(cuda_stream=13), 13),  # torch
        (SimpleNamespace(ptr=14), 14),  # CuPy
        (SimpleNamespace(handle=15), 15),  # PyCUDA
        (SimpleNamespace(__cuda_stream__=lambda: (0, 16)), 16),  # cuda.core
        (
            SimpleNamespace(cuda_stream=0),
            1,
        ),  # torch's default stream; ONNX Runtime takes 0 for none
    ],
)
def test_a_foreign_stream_is_used_and_left_alone(
    bindings: HostDriver, stream: Any, handle: int
) -> None:
    cuda = Cuda(Driver(bindings, DeviceError), stream)
    assert cuda.stream == handle
    cuda.upload(VALUES, cuda.empty(VALUES.shape, "float32"))
    assert bindings.named("cuMemcpyHtoDAsync")[0][3] == handle
    del cuda
    gc.collect()
    assert bindings.named("cuStreamCreate", "cuStreamDestroy") == []


def test_a_foreign_stream_brings_its_context(bindings: HostDriver) -> None:
    bindings.stream_contexts[40] = FOREIGN_CONTEXT
    cuda = Cuda(Driver(bindings, DeviceError), 40)
    assert bindings.current == [CONTEXT]
    with cuda.active():
        assert bindings.current == [CONTEXT, FOREIGN_CONTEXT]
    with pytest.raises(DeviceError, match=r"pycuda\.autoprimaryctx"):
        cuda.check_primary()
    Cuda(Driver(bindings, DeviceError)).check_primary()


def test_the_callers_context_is_current_again_after_an_error(
    cuda: Cuda, bindings: HostDriver
) -> None:
    with pytest.raises(ZeroDivisionError), cuda.active():
        raise ZeroDivisionError
    assert bindings.current == [CONTEXT]


def test_no_stream_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"a stream is an integer handle.*not dict"):
        Cuda(Driver(HostDriver(), DeviceError), {})


def test_streams_are_ordered_without_the_host(cuda: Cuda, bindings: HostDriver) -> None:
    array, back = cuda.zeros((4, 6), "float32"), np.zeros_like(VALUES)
    cuda.synchronize()
    bindings.do_cuMemcpyHtoDAsync(array.address, VALUES.ctypes.data, VALUES.nbytes, 9)
    cuda.wait_for(9)
    cuda.download(array, back)
    cuda.done_before(9)
    bindings.do_cuMemsetD8Async(array.address, 0, array.nbytes, 9)
    assert bindings.named("cuStreamSynchronize") == [(cuda.stream,)]  # the one above
    bindings.drain(9)
    np.testing.assert_array_equal(back, VALUES)
    assert not array.to_host().any()


def test_a_graph_repeats_what_was_captured(cuda: Cuda, bindings: HostDriver) -> None:
    source, back = cuda.pinned((4, 6), "float32"), np.zeros_like(VALUES)
    array = cuda.empty((4, 6), "float32")
    source[:] = VALUES
    with cuda.capture() as graph:
        cuda.upload(source, array)
        cuda.download(array, back)
    cuda.synchronize()
    assert not back.any()  # recorded, not done
    for factor in (1, 2):
        source[:] = factor * VALUES  # the same memory, new numbers
        graph.launch()
        cuda.synchronize()
        np.testing.assert_array_equal(back, factor * VALUES)
    assert (
        bindings.named("cuGraphLaunch")
        == [(bindings.named("cuGraphLaunch")[0][0], cuda.stream)] * 2
    )


def test_a_broken_capture_ends_and_says_why(cuda: Cuda, bindings: HostDriver) -> None:
    with pytest.raises(DeviceError, match=r"cuMemAlloc failed.*900"), cuda.capture() as graph:
        cuda.empty((4,), "uint8")
    assert bindings.captured == {}
    with pytest.raises(DeviceError, match="not captured"):
        graph.launch()
    assert not cuda.zeros((4,), "uint8").to_host().any()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_capture_has_ended(cuda: Cuda, bindings: HostDriver) -> None:
    """Whenever the interrupt came, and whoever holds it, as a notebook does."""
    with cuda.active():
        array = cuda.zeros((4,), "uint8")
    interrupts: list[KeyboardInterrupt] = []

    def capture() -> Graph:
        with cuda.active(), cuda.capture() as graph:
            cuda.clear(array)
        return graph

    for at in range(1, 300):
        counted = Moments(at, interrupt)
        try:
            with counted:
                capture()
        except KeyboardInterrupt as error:
            interrupts.append(error)
        assert bindings.captured == {}
        capture().launch()
        cuda.synchronize()
        if counted.seen < at:
            break
    assert 20 < len(interrupts) < 299


def test_events_measure(cuda: Cuda) -> None:
    start = cuda.event()
    stop = cuda.event()
    stop.wait()
    assert start.seconds_until(stop) == 0.008


def test_a_kernel_gets_its_arguments(
    cuda: Cuda, bindings: HostDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the device's stream, queued behind what is there."""
    binary = tmp_path / "shuffle.fatbin"
    binary.write_bytes(b"shuffle.fatbin")
    monkeypatch.setattr("internvl_edge.kernels.cuda.cuda_binary", lambda source: binary)
    source = DeviceArray.of(cuda.driver, np.arange(20, dtype=np.float32).reshape(1, 5, 4))
    out = cuda.empty((1, 1, 16), "float32")
    CudaKernels(cuda.driver).pixel_shuffle(source, out=out, stream=cuda.stream)
    np.testing.assert_array_equal(out.to_host().ravel(), np.arange(4, 20))
    ((_, *shape),) = bindings.named("cuLaunchKernel")
    assert shape[:8] == [1, 1, 1, 256, 1, 1, 64, cuda.stream]


def test_copies_of_other_sizes_are_refused(cuda: Cuda) -> None:
    with pytest.raises(ValueError, match="sizes must agree"):
        cuda.upload(VALUES, cuda.empty((4, 5), "float32"))
    with pytest.raises(ValueError, match="rows be adjacent"):
        cuda.upload(VALUES[:, ::2], cuda.empty((4, 3), "float32"))


def test_no_memory_is_a_device_error_with_a_remedy(cuda: Cuda, bindings: HostDriver) -> None:
    bindings.capacity = 100
    with pytest.raises(DeviceError, match=r"cuMemAlloc failed: 2 \(2\); use fewer tiles"):
        cuda.empty((101,), "uint8")


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"pip install 'internvl-edge\[gpu\]'"):
        Cuda.open()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            RuntimeError("libcuda.so.1:\n not found"),
            "install an NVIDIA driver, or use the CPU",
        ),
        ((100,), "no NVIDIA GPU here"),
    ],
    ids=["no driver", "no device"],
)
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, answer: Any, text: str) -> None:
    def init(flags: int) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = SimpleNamespace(driver=SimpleNamespace(cuInit=init))
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=module))
    monkeypatch.setitem(sys.modules, "cuda.bindings", module)
    with pytest.raises(DeviceError, match=text) as raised:
        Cuda.open()
    assert "\n" not in str(raised.value)


def test_every_call_exists_in_the_real_bindings(cuda: Cuda, bindings: HostDriver) -> None:
    """What the stand-in answers, cuda-python has too, by that name."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="no cuda-python here")
    known = [name[3:] for name in dir(HostDriver) if name.startswith("do_cu")]
    unanswered = ("cuInit", "cuDeviceGet", "cuCtxSetCurrent", "cuDevicePrimaryCtxRelease")
    destroyed = ("cuEventDestroy", "cuStreamDestroy", "cuGraphDestroy", "cuGraphExecDestroy")
    for name in (*known, *unanswered, *destroyed, "cuFuncSetAttribute", "cuMemcpyDtoDAsync"):
        assert callable(getattr(driver, name))
    pointer = driver.CUpointer_attribute
    assert int(pointer.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) == 9
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1
    assert int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING) == 2
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL is not None


def test_the_stand_in_does_its_work_whole(cuda: Cuda, bindings: HostDriver) -> None:
    """An interrupt comes before a call of the driver or after it, never into what is queued."""
    for at in range(1, 300):
        source, target = cuda.pinned(VALUES.shape, "float32"), cuda.empty(VALUES.shape, "float32")
        source[:] = VALUES
        cuda.upload(source, target)
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            cuda.synchronize()
        np.testing.assert_array_equal(target.to_host(), VALUES)
        if counted.seen < at:
            break
    assert 3 < at < 299


def test_the_stand_in_does_its_work_in_order(cuda: Cuda, bindings: HostDriver) -> None:
    """Also where memory is collected meanwhile, whose end waits for all of it."""
    held, done = [cuda.empty((4,), "uint8")], []
    address = held[0].address

    def collect() -> None:
        held.clear()
        done.append("first")

    bindings.queue(cuda.stream, collect)
    bindings.queue(cuda.stream, lambda: done.append("second"))
    bindings.do_cuMemsetD8Async(address, 7, 4, cuda.stream)
    cuda.synchronize()
    assert done == ["first", "second"]
    assert bindings.memory == {}


def test_the_stand_in_looks_while_memory_is_freed(cuda: Cuda, bindings: HostDriver) -> None:
    """As what is collected meanwhile is."""

    class Collected:
        """The end of a block."""

        @property
        def nbytes(self) -> int:
            held.clear()
            return 1

    blocks: list[Any] = [bindings.memory, bindings.pinned]
    held: list[Any] = [cuda.pinned((4,), "uint8"), cuda.empty((4,), "uint8")]
    for memory in blocks:
        memory[-1] = Collected()
        memory[-2] = memory[-1]
    cuda.upload(VALUES, cuda.empty(VALUES.shape, "float32"))
    assert not held
