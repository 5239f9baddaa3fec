"""A stand-in for `cuda.bindings.driver`: device memory is host memory, a launch runs the bodies.

It lets the whole of `kernels/cuda.py` run without a GPU: addresses, structures, launch shapes,
caches and streams are what a device would get; the arithmetic is the CPU library's.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels import ops
from internvl_edge.kernels.device import Driver
from internvl_edge.kernels.jobs import ShuffleJob, TileJob

OK = 0
INVALID = 1
ELAPSED_MS = 8.0


class HostDriver:
    """The calls `kernels/device.py` and `kernels/cuda.py` make, by name."""

    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_POINTER="device pointer")
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared"
    )

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.pinned: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            done = getattr(self, f"do_{name}", None)
            return (OK,) if done is None else done(*arguments)

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def do_cuCtxGetCurrent(self) -> tuple[int, int]:
        return OK, 77

    def do_cuMemAlloc(self, size: int) -> tuple[int, int]:
        block = np.full(size, 0xCC, np.uint8)
        self.memory[block.ctypes.data] = block
        return OK, block.ctypes.data

    def do_cuMemFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (OK,)

    def do_cuMemcpyHtoD(self, to: int, source: int, size: int) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (OK,)

    def do_cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> tuple[int]:
        return self.do_cuMemcpyHtoD(to, source, size)

    def do_cuMemcpyDtoH(self, to: int, source: int, size: int) -> tuple[int]:
        return self.do_cuMemcpyHtoD(to, source, size)

    def do_cuPointerGetAttribute(self, attribute: str, address: int) -> tuple[int, int]:
        assert attribute == "device pointer"
        return (OK, address) if address in self.pinned else (INVALID, 0)

    def do_cuStreamCreate(self, flags: int) -> tuple[int, int]:
        return OK, 21

    def do_cuStreamEndCapture(self, stream: int) -> tuple[int, str]:
        return OK, "graph"

    def do_cuGraphInstantiate(self, graph: str, flags: int) -> tuple[int, str]:
        return OK, "executable"

    def do_cuEventCreate(self, flags: int) -> tuple[int, str]:
        return OK, "event"

    def do_cuEventElapsedTime(self, start: str, stop: str) -> tuple[int, float]:
        return OK, ELAPSED_MS

    def do_cuModuleLoadData(self, image: bytes) -> tuple[int, str]:
        return OK, image.decode()

    def do_cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, str]:
        assert ("shuffle" in module) == (b"shuffle" in name)
        return OK, name.decode()

    def do_cuLaunchKernel(self, function: str, *arguments: Any) -> tuple[int]:
        *_, parameters, extra = arguments
        assert extra == 0
        address = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        assert address is not None
        library = ops.cpu_kernels()
        assert library is not None
        if "shuffle" in function:
            job = ShuffleJob.from_address(address)
            assert library.ive_cpu_pixel_shuffle(ctypes.byref(job), 1) == 0
        elif function != "ive_tile_horizontal":  # the bodies of both passes, at the second
            job = TileJob.from_address(address)
            assert library.ive_cpu_tile_elements(ctypes.byref(job)) == 0
        return (OK,)


def open_driver() -> tuple[Driver, HostDriver]:
    bindings = HostDriver()
    return Driver(bindings), bindings
