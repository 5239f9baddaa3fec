"""A stand-in for `cuda.bindings.driver`: device memory is host memory, a launch runs the bodies.

It lets the whole CUDA path run without a GPU: addresses, structures, launch shapes, streams and
graphs are what a device would get; the kernels' bodies run on the CPU. Work on a stream is done
when somebody waits for it and not before, so that a wait that is missing shows in the results. An
interrupt comes before a call or after it, as with a driver in C, and work is done whole and in
order, whatever Python runs meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels import ops
from internvl_edge.kernels.device import DeviceArray, Driver
from internvl_edge.kernels.jobs import SelectJob, ShuffleJob, TileJob

OK = 0
INVALID = 1
OUT_OF_MEMORY = 2
CAPTURE_UNSUPPORTED = 900
ELAPSED_MS = 8.0
CONTEXT, FOREIGN_CONTEXT = 77, 78

#: What a kernel is told, by the second word of its name.
JOBS: dict[str, Any] = {"tile": TileJob, "pixel": ShuffleJob, "select": SelectJob}

Work = Callable[[], Any]
Status = tuple[int, ...]


@dataclass
class Mark:
    """A recorded event: a place in a stream's queue."""

    stream: int = 0
    place: Work | None = None


@dataclass
class HostDriver:
    """The calls `device` and `cuda` of kernels/ and `cuda` of the backends make, by name.

    Attributes:
        calls: every call in order, name first.
        memory, pinned: device and page-locked memory in use, by address.
        queues: work not done yet, by stream.
        working: streams whose work is being done.
        capacity: bytes of device memory.
        current: the stack of contexts.
        stream_contexts: contexts of streams that are not in the primary one.
        devices: of memory that is not on the first, by address.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    pinned: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    queues: dict[int, list[Work]] = field(default_factory=dict)
    working: set[int] = field(default_factory=set)
    captured: dict[int, list[Work]] = field(default_factory=dict)
    capacity: int = 1 << 40
    current: list[int] = field(default_factory=lambda: [CONTEXT])
    stream_contexts: dict[int, int] = field(default_factory=dict)
    devices: dict[int, int] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_DEVICE_POINTER="device pointer",
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="device ordinal",
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared"
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=7,
        CU_DEVICE_ATTRIBUTE_INTEGRATED=1,
    )
    CUDA_MEMCPY3D = SimpleNamespace
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE="device memory")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            done = getattr(type(self), f"do_{name}", None)
            if done is None:
                return (OK,)
            traced, profiled = sys.gettrace(), sys.getprofile()
            sys.settrace(None)
            sys.setprofile(None)
            try:
                answer: Status = done(self, *arguments)
            finally:
                sys.setprofile(profiled)
                sys.settrace(traced)
            return answer

        return call

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """Arguments of the calls of these names."""
        return [call[1:] for call in self.calls if call[0] in names]

    def queue(self, stream: int, work: Work) -> None:
        """Put work on a stream, or into the graph that is being captured from it."""
        key = int(stream) or 1
        self.captured.get(key, self.queues.setdefault(key, [])).append(work)

    def drain(self, stream: int, upto: Work | None = None) -> None:
        """Do a stream's work, all of it or up to a recorded place.

        Work of one stream is done in order, whoever waits: what is being done cannot wait for
        itself, as where memory that is collected meanwhile is freed.
        """
        key = int(stream) or 1
        waiting = self.queues.setdefault(key, [])
        with self.lock:
            if key in self.working:
                return
            self.working.add(key)
            try:
                while waiting and (upto is None or any(work is upto for work in waiting)):
                    waiting.pop(0)()
            finally:
                self.working.remove(key)

    # Contexts.

    def do_cuCtxGetCurrent(self) -> Status:
        return OK, self.current[-1]

    def do_cuCtxPushCurrent(self, context: int) -> Status:
        self.current.append(context)
        return (OK,)

    def do_cuCtxPopCurrent(self) -> Status:
        return OK, self.current.pop()

    def do_cuCtxGetDevice(self) -> Status:
        return OK, 0

    def do_cuDevicePrimaryCtxRetain(self, device: int) -> Status:
        return OK, CONTEXT

    def do_cuDeviceGetAttribute(self, attribute: int, device: int) -> Status:
        return OK, attribute

    def do_cuDriverGetVersion(self) -> Status:
        return OK, 13020

    def do_cuDeviceTotalMem(self, device: int) -> Status:
        return OK, self.capacity

    def do_cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return OK, b"stand-in".ljust(length, b"\0")

    def do_cuStreamGetCtx(self, stream: int) -> Status:
        return OK, self.stream_contexts.get(stream, self.current[-1])

    # Memory.

    def do_cuMemAlloc(self, size: int) -> Status:
        if self.captured:
            return CAPTURE_UNSUPPORTED, 0
        if size + sum(block.nbytes for block in self.memory.copy().values()) > self.capacity:
            return OUT_OF_MEMORY, 0
        block = np.full(size, 0xFF, np.uint8)  # NaN in every float
        self.memory[block.ctypes.data] = block
        return OK, block.ctypes.data

    def do_cuMemFree(self, address: int) -> Status:
        self.do_cuCtxSynchronize()
        block = self.memory.pop(address)
        for stream in self.working:  # what is left there may name it
            self.queues[stream].append(partial(id, block))
        return (OK,)

    def do_cuMemHostAlloc(self, size: int, flags: int) -> Status:
        block = np.full(size, 0xFF, np.uint8)
        self.pinned[block.ctypes.data] = block
        return OK, block.ctypes.data

    def do_cuMemFreeHost(self, address: int) -> Status:
        del self.pinned[address]
        return (OK,)

    def do_cuMemcpyHtoD(self, to: int, source: int, size: int) -> Status:
        ctypes.memmove(to, source, size)
        return (OK,)

    def do_cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> Status:
        if self._is_pinned(source):
            self.queue(stream, lambda: ctypes.memmove(to, source, size))
        else:  # the driver takes pageable bytes before it returns
            taken = ctypes.string_at(source, size)
            self.queue(stream, lambda: ctypes.memmove(to, taken, size))
        return (OK,)

    def do_cuMemcpyDtoH(self, to: int, source: int, size: int) -> Status:
        return self.do_cuMemcpyHtoD(to, source, size)

    def do_cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> Status:
        self.queue(stream, lambda: ctypes.memmove(to, source, size))
        return (OK,)

    def do_cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> Status:
        self.queue(stream, lambda: ctypes.memmove(to, source, size))
        return (OK,)

    def do_cuMemcpy3DAsync(self, job: Any, stream: int) -> Status:
        def copy() -> None:
            for plane, run in itertools.product(range(job.Depth), range(job.Height)):
                source = job.srcDevice + (plane * job.srcHeight + run) * job.srcPitch
                target = job.dstDevice + (plane * job.dstHeight + run) * job.dstPitch
                ctypes.memmove(target, source, job.WidthInBytes)

        assert job.WidthInBytes <= min(job.srcPitch, job.dstPitch)
        assert job.Height <= min(job.srcHeight, job.dstHeight)
        self.queue(stream, copy)
        return (OK,)

    def do_cuMemsetD8Async(self, to: int, value: int, size: int, stream: int) -> Status:
        self.queue(stream, lambda: ctypes.memset(to, value, size))
        return (OK,)

    def do_cuPointerGetAttribute(self, attribute: str, address: int) -> Status:
        known = self._is_pinned(address) or _holds(self.memory, address)
        if not known:
            return INVALID, 0
        return OK, (self.devices.get(address, 0) if attribute == "device ordinal" else address)

    def _is_pinned(self, address: int) -> bool:
        return _holds(self.pinned, address)

    # Streams, events and graphs.

    def do_cuCtxSynchronize(self) -> Status:
        for stream in list(self.queues):
            self.drain(stream)
        return (OK,)

    def do_cuStreamCreate(self, flags: int) -> Status:
        return OK, 21

    def do_cuStreamSynchronize(self, stream: int) -> Status:
        if stream in self.captured:
            return (CAPTURE_UNSUPPORTED,)
        self.drain(stream)
        return (OK,)

    def do_cuEventCreate(self, flags: int) -> tuple[int, Mark]:
        return OK, Mark()

    def do_cuEventRecord(self, event: Mark, stream: int) -> Status:
        event.stream, event.place = stream, lambda: None
        self.queue(stream, event.place)
        return (OK,)

    def do_cuStreamWaitEvent(self, stream: int, event: Mark, flags: int) -> Status:
        source, place = event.stream, event.place
        self.queue(stream, lambda: self.drain(source, place))
        return (OK,)

    def do_cuEventSynchronize(self, event: Mark) -> Status:
        self.drain(event.stream, event.place)
        return (OK,)

    def do_cuEventElapsedTime(self, start: Mark, stop: Mark) -> tuple[int, float]:
        return OK, ELAPSED_MS

    def do_cuStreamBeginCapture(self, stream: int, mode: str) -> Status:
        self.captured[stream] = []
        return (OK,)

    def do_cuStreamEndCapture(self, stream: int) -> tuple[int, list[Work]]:
        if stream not in self.captured:
            return INVALID, []
        return OK, self.captured.pop(stream)

    def do_cuGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, list[Work]]:
        return OK, graph

    def do_cuGraphLaunch(self, graph: list[Work], stream: int) -> Status:
        for work in graph:
            self.queue(stream, work)
        return (OK,)

    # Kernels.

    def do_cuModuleLoadData(self, image: bytes) -> tuple[int, str]:
        return OK, image.decode()

    def do_cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, str]:
        assert all((word in module) == (word.encode() in name) for word in ("shuffle", "select"))
        return OK, name.decode()

    def do_cuLaunchKernel(self, function: str, *arguments: Any) -> Status:
        *_, stream, parameters, extra = arguments
        assert extra == 0
        address = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        assert address is not None
        kind = JOBS[function.split("_")[1]]
        # The driver copies the arguments before it returns.
        job = kind.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(kind)))
        self.queue(stream, lambda: _run_kernel(function, job))
        return (OK,)


def _run_kernel(function: str, job: ShuffleJob | TileJob | SelectJob) -> None:
    library = ops.cpu_kernels()
    assert library is not None
    if isinstance(job, ShuffleJob):
        assert library.ive_cpu_pixel_shuffle_blocks(ctypes.byref(job)) == 0
    elif isinstance(job, SelectJob):
        assert library.ive_cpu_select_blocks(ctypes.byref(job)) == 0
    # The bodies of both passes, at the second.
    elif function != "ive_tile_horizontal":
        assert library.ive_cpu_tile_elements(ctypes.byref(job)) == 0


def _holds(blocks: dict[int, NDArray[np.uint8]], address: int) -> bool:
    # Of a copy: what is collected meanwhile is freed.
    held = blocks.copy().items()
    return any(start <= address < start + max(b.nbytes, 1) for start, b in held)


def open_driver() -> tuple[Driver, HostDriver]:
    bindings = HostDriver()
    return Driver(bindings), bindings


def on_device(bindings: HostDriver, pixels: NDArray[Any], **changes: Any) -> Any:
    """An image in device memory, its interface changed as told."""
    array = DeviceArray.of(Driver(bindings), pixels)
    interface = array.__cuda_array_interface__ | changes
    return SimpleNamespace(__cuda_array_interface__=interface, held=array)
