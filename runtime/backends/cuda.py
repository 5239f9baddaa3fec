"""One CUDA device for the runtime: memory, copies, streams, events, graphs.

    cuda = Cuda.open()                      # or Cuda.open(torch.cuda.current_stream())
    with cuda.active():
        rows = cuda.empty((4, 8), "float32")
        cuda.upload(values, rows)           # queued; from pinned memory the host goes on
        with cuda.capture() as graph:
            ...
        graph.launch()
        cuda.download(rows, values)
        cuda.synchronize()

Built on `kernels/device.py`, whose driver checks every call; a refused one is a `DeviceError`.
Kernels are launched by `kernels/cuda.py`, on the stream it is given.
Everything is queued on one stream, so that nothing waits but the host for results.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.quoting import reason
from internvl_edge.kernels.device import (
    LEGACY_STREAM,
    Acquired,
    DeviceArray,
    Driver,
    stream_handle,
)

#: A stream of its own does not wait for the default stream.
NON_BLOCKING = 1


@dataclass(frozen=True)
class Box:
    """Runs of bytes in device memory: `pitch` bytes apart, `runs` of them to the next plane."""

    address: int
    pitch: int
    runs: int


class Cuda:
    """A device, a context and a stream; the stream is the caller's or its own.

    Work goes on in `with cuda.active():`.
    """

    def __init__(self, driver: Driver, stream: Any = None) -> None:
        self.driver = driver
        self._lock = threading.RLock()
        self._capturing: Graph | None = None
        self.context = driver.context()
        if stream is not None:
            self.stream = _adopted(stream)
            self.context = int(driver("cuStreamGetCtx", self.stream))
        with driver.in_context(self.context):
            self.device = int(driver("cuCtxGetDevice"))
            if stream is None:
                self._own = driver.acquire("cuStreamCreate", "cuStreamDestroy", NON_BLOCKING)
                self.stream = int(self._own.handle)

    @classmethod
    def open(cls, stream: Any = None) -> Cuda:
        """Use a stream's context, else the thread's current one, else the first device's primary.

        Args:
            stream: the caller's, to work on: an integer handle or an object of torch, CuPy, PyCUDA
                or cuda.core. It must outlive this object. None makes one.

        Raises:
            DeviceError: no cuda-python, no driver, no GPU, or no stream.
        """
        return cls(Driver.open(DeviceError), stream)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the context current; the caller's own is so again afterwards. One thread at a time:
        what a pass queues belongs together on the stream. After an error or an interrupt nothing
        is under way: what was queued reads memory that others may write next, or free."""
        with self._lock, self.driver.in_context(self.context):
            try:
                yield
            except BaseException:
                self._end_capture()
                self.driver.bindings.cuStreamSynchronize(self.stream)  # whatever its status is
                raise

    def check_primary(self) -> None:
        """Raise DeviceError unless the context is the one libraries on the CUDA runtime work in."""
        primary = int(self.driver("cuDevicePrimaryCtxRetain", self.device))
        self.driver("cuDevicePrimaryCtxRelease", self.device)
        if primary != self.context:
            raise DeviceError(
                "the current CUDA context is not the device's primary one, in which ONNX Runtime"
                " works; with PyCUDA, import pycuda.autoprimaryctx instead of pycuda.autoinit"
            )

    @property
    def name(self) -> str:
        """The device's own name."""
        raw: bytes = self.driver("cuDeviceGetName", 100, self.device)
        return raw.partition(b"\0")[0].decode()

    @property
    def integrated(self) -> bool:
        """Whether host and device share their memory."""
        kind = self.driver.bindings.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        return bool(self.driver("cuDeviceGetAttribute", kind, self.device))

    @property
    def memory_bytes(self) -> int:
        """Memory of the device; on a Jetson, of the board."""
        return int(self.driver("cuDeviceTotalMem", self.device))

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability: (8, 7) is sm_87."""
        kinds = self.driver.bindings.CUdevice_attribute
        major = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        ask = partial(self.driver, "cuDeviceGetAttribute")
        return int(ask(major, self.device)), int(ask(minor, self.device))

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """New device memory, freed with the array."""
        return DeviceArray(self.driver, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """New device memory, cleared on the stream."""
        array = self.empty(shape, dtype)
        self.clear(array)
        return array

    def clear(self, array: DeviceArray) -> None:
        """Queue zeros into device memory."""
        self.driver("cuMemsetD8Async", array.address, 0, array.nbytes, self.stream)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Page-locked host memory: copies from and to it run beside the host. Freed with it."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        whole = np.asarray(_Pinned(self.driver, max(size, 1)))[:size]
        return whole.view(kind).reshape(shape)

    def upload(self, source: NDArray[Any], target: DeviceArray) -> None:
        """Queue a copy to the device; pinned memory must stay as it is until it has been made."""
        _check_copy(source, target)
        size, address = source.nbytes, source.ctypes.data
        self.driver("cuMemcpyHtoDAsync", target.address, address, size, self.stream)

    def download(self, source: DeviceArray, target: NDArray[Any]) -> None:
        """Queue a copy to the host; its bytes are there after `synchronize`."""
        _check_copy(target, source)
        size, address = source.nbytes, target.ctypes.data
        self.driver("cuMemcpyDtoHAsync", address, source.address, size, self.stream)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Queue a copy between two device addresses."""
        self.driver("cuMemcpyDtoDAsync", target, source, nbytes, self.stream)

    def copy_box(self, source: Box, target: Box, size: tuple[int, int, int]) -> None:
        """Queue a copy of `size`: bytes of a run, runs of a plane, planes."""
        bindings = self.driver.bindings
        job = bindings.CUDA_MEMCPY3D()
        job.srcMemoryType = job.dstMemoryType = bindings.CUmemorytype.CU_MEMORYTYPE_DEVICE
        job.srcDevice, job.srcPitch, job.srcHeight = source.address, source.pitch, source.runs
        job.dstDevice, job.dstPitch, job.dstHeight = target.address, target.pitch, target.runs
        job.WidthInBytes, job.Height, job.Depth = size
        self.driver("cuMemcpy3DAsync", job, self.stream)

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self.driver("cuStreamSynchronize", self.stream)

    def wait_for(self, stream: int) -> None:
        """What is queued from now on waits for what is on another stream; the host does not."""
        self.driver.order(stream, self.stream)

    def done_before(self, stream: int) -> None:
        """What comes on another stream from now on waits for what is queued here."""
        self.driver.order(self.stream, stream)

    def event(self) -> Event:
        """Record a point in the stream's work."""
        event = Event(self)
        self.driver("cuEventRecord", event.handle, self.stream)
        return event

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is queued inside, instead of doing it; nothing may be allocated there."""
        mode = self.driver.bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        graph = Graph(self)
        try:
            self._capturing = graph  # first: an interrupt may come when it has begun
            self.driver("cuStreamBeginCapture", self.stream, mode)
            yield graph
        except BaseException:
            if self._capturing is graph:
                self._end_capture()
            raise
        captured = self._captured()
        self._capturing = None
        graph.take(captured)

    def _end_capture(self) -> None:
        """End what is being captured, if anything is: the stream does nothing else until then."""
        if self._capturing is not None:
            with suppress(self.driver.failure):  # of a broken capture
                self._captured()
            self._capturing = None

    def _captured(self) -> Acquired:
        """End the capture under way; return what was captured."""
        return self.driver.acquire("cuStreamEndCapture", "cuGraphDestroy", self.stream)


class Event:
    """A point in a stream's work."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._made = cuda.driver.acquire("cuEventCreate", "cuEventDestroy", 0)

    @property
    def handle(self) -> Any:
        """The driver's name of it."""
        return self._made.handle

    def wait(self) -> None:
        """Wait on the host until it is reached."""
        self._cuda.driver("cuEventSynchronize", self.handle)

    def seconds_until(self, later: Event) -> float:
        """Time between two events that have been reached."""
        return float(self._cuda.driver("cuEventElapsedTime", self.handle, later.handle)) / 1e3


class Graph:
    """Work captured once and launched as a whole; see `Cuda.capture`."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._executable: Acquired | None = None

    def take(self, captured: Acquired) -> None:
        """Make the captured work ready to launch."""
        self._executable = self._cuda.driver.acquire(
            "cuGraphInstantiate", "cuGraphExecDestroy", captured.handle, 0
        )
        captured.release()

    def launch(self) -> None:
        """Queue the captured work. The memory it was captured with is used again."""
        if self._executable is None:
            raise DeviceError("the graph was not captured; end the `with` block of capture first")
        self._cuda.driver("cuGraphLaunch", self._executable.handle, self._cuda.stream)


class _Pinned:
    """Page-locked bytes as NumPy takes them, which holds on to them for its arrays."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._memory = driver.acquire("cuMemHostAlloc", "cuMemFreeHost", size, 0)
        address = int(self._memory.handle)
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _adopted(stream: Any) -> int:
    """A caller's stream. ONNX Runtime takes 0 for none, so the default stream goes by its name."""
    try:
        return stream_handle(stream) or LEGACY_STREAM
    except TypeError as error:
        raise DeviceError(f"{reason(error)}; got a {type(stream).__name__}") from error


def _check_copy(host: NDArray[Any], device: DeviceArray) -> None:
    if host.nbytes != device.nbytes or not host.flags.c_contiguous:
        raise ValueError(
            f"a copy between {host.dtype} {host.shape} and {device.dtype} {device.shape}: sizes"
            " must agree and rows be adjacent"
        )
