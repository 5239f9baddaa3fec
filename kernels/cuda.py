"""The kernels on a CUDA device: fat binaries loaded once a context, launched on the given stream.

    kernels = CudaKernels.open()
    kernels.tile(image, columns=4, rows=3, out=out, layout="patches", stream=torch_stream)

`image`, `features`, `weight`, `bias` and `out` are device arrays of any framework
(`__cuda_array_interface__`: torch, CuPy, PyCUDA, Numba, `device.DeviceArray`). An image may also be
a NumPy array: pinned and managed memory is read in place (on Jetson nothing is copied), other
memory is copied first. Calls return when the work is queued; arrays must live until it is done.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from internvl_edge.kernels.build import CUDA_SOURCES, cuda_binary
from internvl_edge.kernels.device import (
    DeviceArray,
    Driver,
    Scratch,
    describe,
    producer_stream,
    stream_handle,
)
from internvl_edge.kernels.images import Planes, planes_of
from internvl_edge.kernels.jobs import (
    TYPES,
    AxisStruct,
    LaunchShape,
    SelectJob,
    ShuffleJob,
    ShufflePlan,
    TileJob,
    TilePlan,
    check_norm,
    check_out,
)
from internvl_edge.kernels.ops import job_axes
from internvl_edge.kernels.weights import Weights

TILING_SOURCE, SHUFFLE_SOURCE, SELECT_SOURCE = CUDA_SOURCES
#: By the second word of a kernel's name.
SOURCE_OF = {"tile": TILING_SOURCE, "pixel": SHUFFLE_SOURCE, "select": SELECT_SOURCE}
SHORT = {"uint8": "u8", "float32": "f32", "float16": "f16", "int8": "i8", "uint64": "u64"}
MAX_GRID_YZ = 65535
TILE_THREADS = 128
SHUFFLE_THREADS = 256
#: Logits a block sorts at once, and the most it keeps of them.
SELECT_RUN, SELECT_MOST = 1024, 64
#: A logit and its index in one number, as select.cuh makes it.
CANDIDATE = np.dtype(np.uint64)

#: Weights of this many axes stay on the device; a video uses four.
CACHED_AXES = 64


@dataclass(frozen=True)
class _Axis:
    """Weights of an axis on the device, which are freed with it."""

    struct: AxisStruct
    arrays: list[DeviceArray]


class CudaKernels:
    """Tiling, pixel shuffle and selection of logits in the context that is current at each call."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._functions: dict[tuple[int, str], Any] = {}
        self._modules: dict[tuple[int, str], Any] = {}
        self._axes: OrderedDict[tuple[int, int, int, bool], _Axis] = OrderedDict()
        self._scratch = Scratch(driver)
        self._staging = Scratch(driver)

    @classmethod
    def open(cls) -> CudaKernels:
        """Initialise the driver.

        Raises:
            CudaError: no cuda-python, driver or device.
        """
        return cls(Driver.open())

    def tile(
        self,
        image: Any,
        *,
        columns: int,
        rows: int,
        out: Any,
        tile_size: int = 448,
        patch_size: int = 14,
        thumbnail: bool = True,
        layout: str = "tiles",
        dtype: DTypeLike | None = None,
        pixel_format: str = "rgb",
        matrix: str = "bt601",
        short_weights: bool = False,
        stream: Any = None,
    ) -> Any:
        """`ops.tile` on the device; `out` is a device array of the result's shape and dtype.

        Raises:
            ValueError, TypeError: not as in `ops.tile`, or tile_size is no multiple of 4.
            BuildError: the fat binary is not in the cache and cannot be built.
            CudaError: the driver refused a call.
        """
        if tile_size % 4:
            raise ValueError(f"tile_size is {tile_size}; on CUDA it must be a multiple of 4")
        plan = TilePlan.of(
            columns, rows, tile_size, patch_size, thumbnail, layout, dtype, short_weights
        )
        handle, context = stream_handle(stream), self.driver.context()
        planes = self._planes(image, pixel_format, matrix, context, handle)
        job = TileJob()
        plan.fill(job)
        job.image, job.out = planes.struct(), _output_address(out, plan.shape, plan.dtype)
        job.scratch = self._scratch.get(context, handle, scratch_bytes(planes.height, plan))
        for index, axes in enumerate(job_axes(planes.width, planes.height, plan)):
            job.across[index] = self._axis(context, axes["across"])
            job.down[index] = self._axis(context, axes["down"])
        first, second = tile_shapes(planes.height, plan)
        self._launch(context, "ive_tile_horizontal", first, 0, handle, job)
        name = f"ive_tile_{plan.layout}_{SHORT[plan.dtype.name]}"
        self._launch(context, name, second, 0, handle, job)
        return out

    def pixel_shuffle(
        self,
        features: Any,
        *,
        out: Any,
        grid: tuple[int, int] | None = None,
        version: str = "v2",
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        scale: float | None = None,
        stream: Any = None,
    ) -> Any:
        """`ops.pixel_shuffle` on the device; `weight` and `bias` are float32 device arrays.

        Raises:
            ValueError, TypeError: an argument is not as in `ops.pixel_shuffle`.
            BuildError: the fat binary is not in the cache and cannot be built.
            CudaError: the driver refused a call, or a token exceeds the device's shared memory.
        """
        handle, context = stream_handle(stream), self.driver.context()
        source = self._device(features, handle)
        plan = ShufflePlan.of(source.shape, source.dtype, grid, version, dtype, scale, eps)
        norm = [None if a is None else self._device(a, handle) for a in (weight, bias)]
        check_norm(plan, *norm)
        for array in (source, *norm):
            _check_contiguous(array)
        job = ShuffleJob()
        plan.fill(job)
        job.input, job.out = source.ctypes.data, _output_address(out, plan.shape, plan.dtype)
        for name, array in zip(("weight", "bias"), norm, strict=True):
            if array is not None:
                if array.dtype != np.float32:
                    raise TypeError(f"{name} is {array.dtype}; on CUDA it must be float32")
                setattr(job, name, array.ctypes.data)
        name = f"ive_pixel_shuffle_{SHORT[plan.in_dtype.name]}_{SHORT[plan.dtype.name]}"
        shared = plan.width * plan.in_dtype.itemsize
        self._launch(context, name, shuffle_shape(plan), shared, handle, job)
        return out

    def select(self, logits: Any, *, out: Any, scratch: Any, stream: Any = None) -> Any:
        """The largest logits in order: of equals the first, and a NaN before every number.

        One launch or more and no memory of its own: what is captured after one call stays valid as
        long as the three arrays. `read_candidates` tells what the result says.

        Args:
            logits: float32 or float16 `(n,)`, 1 <= n < 2^31.
            out: uint64 `(count,)`, 1 <= count <= SELECT_MOST.
            scratch: uint64 `(select_scratch(n, count),)`, overwritten.

        Returns:
            `out`: zeros where there are fewer logits.

        Raises:
            ValueError, TypeError: an argument is not as above.
            BuildError: the fat binary is not in the cache and cannot be built.
            CudaError: the driver refused a call.
        """
        handle, context = stream_handle(stream), self.driver.context()
        source = self._device(logits, handle)
        if source.ndim != 1 or not 1 <= source.size < 2**31:
            raise ValueError(f"logits are of one row (n,), 1 <= n < 2^31, not {source.shape}")
        if source.dtype.name not in ("float32", "float16"):
            raise TypeError(f"logits are float32 or float16, not {source.dtype}")
        _check_contiguous(source)
        count = len(out)
        if not 1 <= count <= SELECT_MOST:
            raise ValueError(f"{count} candidates: the kernel keeps 1 to {SELECT_MOST}")
        to = _output_address(out, (count,), CANDIDATE)
        needed = (select_scratch(source.size, count),)
        free = _output_address(scratch, needed, CANDIDATE)
        address, size, kind = source.ctypes.data, source.size, source.dtype.name
        for kept in select_levels(source.size, count):
            last = kept == count
            job = SelectJob(address, to if last else free, size, count, TYPES[kind])
            name = f"ive_select_{SHORT[kind]}"
            self._launch(context, name, select_shape(size), 0, handle, job)
            address, size, kind = free, kept, CANDIDATE.name
            free += kept * CANDIDATE.itemsize
        return out

    def _planes(
        self, image: Any, pixel_format: str, matrix: str, context: int, stream: int
    ) -> Planes:
        """The image's planes, each at an address the device can read."""
        parts = image if isinstance(image, tuple) else (image,)
        if all(isinstance(part, np.ndarray) for part in parts):
            host = planes_of(image, pixel_format, matrix)
            return self._host_planes(host, context, stream)
        views = tuple(self._device(part, stream) for part in parts)
        given = views if isinstance(image, tuple) else views[0]
        return planes_of(given, pixel_format, matrix, copy=False)

    def _host_planes(self, planes: Planes, context: int, stream: int) -> Planes:
        """Pinned and managed planes in place; pageable ones copied, on the stream."""
        hosts = [plane for plane in (planes.pixels, planes.chroma) if plane is not None]
        addresses = [self.driver.address_on_device(plane) for plane in hosts]
        if any(address is None for address in addresses):
            hosts = [np.ascontiguousarray(plane) for plane in hosts]
            begin = self._staging.get(context, stream, sum(plane.nbytes for plane in hosts))
            addresses = []
            for plane in hosts:  # from pageable memory this returns when the bytes are taken
                self.driver("cuMemcpyHtoDAsync", begin, plane.ctypes.data, plane.nbytes, stream)
                addresses.append(begin)
                begin += plane.nbytes
        views = [_moved(plane, address) for plane, address in zip(hosts, addresses, strict=True)]
        chroma = views[1] if len(views) > 1 else None
        return Planes(views[0], chroma, planes.pixel_format, planes.matrix)

    def _device(self, array: Any, stream: int) -> NDArray[Any]:
        """A description of a device array, once the work that fills it is ordered before ours."""
        if not hasattr(array, "__cuda_array_interface__"):
            raise TypeError(
                f"{type(array).__name__} is no device array (__cuda_array_interface__); use"
                " DeviceArray.of(driver, array) or a framework's"
            )
        producer = producer_stream(array)
        if producer is not None:
            self.driver.order(producer, stream)
        return describe(array)

    def _axis(self, context: int, axis: Weights) -> AxisStruct:
        """The axis's weights on the device, uploaded once."""
        key = (context, axis.size_in, axis.size, axis.short)
        if key not in self._axes:
            if len(self._axes) >= CACHED_AXES:
                self.driver("cuCtxSynchronize")
                self._axes.popitem(last=False)
            of = [DeviceArray.of(self.driver, a) for a in (axis.low, axis.count, axis.weights)]
            addresses = (array.address for array in of)
            self._axes[key] = _Axis(AxisStruct(*addresses, axis.taps, axis.size), of)
        self._axes.move_to_end(key)
        return self._axes[key].struct

    def _launch(
        self,
        context: int,
        name: str,
        shape: LaunchShape,
        shared: int,
        stream: int,
        job: ctypes.Structure,
    ) -> None:
        function = self._function(context, name)
        if shared > 48 * 1024:  # more must be asked for
            attribute = self.driver.bindings.CUfunction_attribute
            limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.driver("cuFuncSetAttribute", function, limit, shared)
        # The driver copies the job before it returns; it takes an array of parameter addresses.
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        blocks, threads = (shape.x, shape.y, shape.z), (shape.threads, 1, 1)
        where = ctypes.addressof(parameters)
        self.driver("cuLaunchKernel", function, *blocks, *threads, shared, stream, where, 0)

    def _function(self, context: int, name: str) -> Any:
        if (context, name) not in self._functions:
            source = SOURCE_OF[name.split("_")[1]]
            self._functions[context, name] = self.driver(
                "cuModuleGetFunction", self._module(context, source), name.encode()
            )
        return self._functions[context, name]

    def _module(self, context: int, source: str) -> Any:
        """One of CUDA_SOURCES, loaded into this context."""
        if (context, source) not in self._modules:
            image = cuda_binary(source).read_bytes()
            self._modules[context, source] = self.driver("cuModuleLoadData", image)
        return self._modules[context, source]


def scratch_bytes(height: int, plan: TilePlan) -> int:
    """uint8 between the passes: (3, height, columns * S), and (3, height, S) for the thumbnail."""
    return 3 * height * plan.tile_size * (plan.columns + int(plan.thumbnail))


def tile_shapes(height: int, plan: TilePlan) -> tuple[LaunchShape, LaunchShape]:
    """Launch shapes of the two passes, as `horizontal_shape` and `vertical_shape` in tiling.cuh."""
    width = (plan.columns + int(plan.thumbnail)) * plan.tile_size
    side = plan.tile_size
    first = LaunchShape(-(-width // TILE_THREADS), min(height, MAX_GRID_YZ), 1, TILE_THREADS)
    second = LaunchShape(
        -(-(side // 4) // TILE_THREADS),
        min(side, MAX_GRID_YZ),
        min(plan.tiles * 3, MAX_GRID_YZ),
        TILE_THREADS,
    )
    return first, second


def shuffle_shape(plan: ShufflePlan) -> LaunchShape:
    """One block an output token, as `shuffle_shape` in pixel_shuffle.cuh."""
    return LaunchShape(plan.shape[0] * plan.shape[1], 1, 1, SHUFFLE_THREADS)


def select_shape(size: int) -> LaunchShape:
    """One block a run, as `select_shape` in select.cuh."""
    return LaunchShape(-(-size // SELECT_RUN), 1, 1, SELECT_RUN // 2)


def select_levels(size: int, count: int) -> list[int]:
    """Return how many candidates each launch leaves, until `count` are left."""
    levels = [select_shape(size).x * count]
    while levels[-1] > count:
        levels.append(select_shape(levels[-1]).x * count)
    return levels


def select_scratch(size: int, count: int) -> int:
    """Candidates between the launches."""
    return sum(select_levels(size, count)[:-1])


def read_candidates(found: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return what `CudaKernels.select` found: indices and logits on the host, largest first.

    Inverts `candidate` of select.cuh; -0 comes back as 0.

    Args:
        found: `(count,)`, zeros where there were fewer logits.

    Returns:
        int64 `(n,)` and float32 `(n,)`, n <= count.
    """
    found = found[found != 0]
    ids = (~found & 0xFFFFFFFF).astype(np.int64)
    bits = (found >> np.uint64(32)).astype(np.uint32)
    positive = bits & np.uint32(0x80000000) != 0
    return ids, np.where(positive, bits ^ np.uint32(0x80000000), ~bits).view(np.float32)


def _output_address(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    if not hasattr(out, "__cuda_array_interface__"):
        raise TypeError(f"out is {type(out).__name__}, it must be a device array of {shape}")
    described = describe(out)
    check_out(described, shape, dtype)
    return int(described.ctypes.data)


def _check_contiguous(array: NDArray[Any] | None) -> None:
    if array is not None and not array.flags.c_contiguous:
        raise ValueError(f"a device array of strides {array.strides} must be made contiguous first")


def _moved(plane: NDArray[np.uint8], address: int | None) -> NDArray[np.uint8]:
    """Return the same plane at another address."""

    class Moved:
        __array_interface__ = plane.__array_interface__ | {
            "data": (address, True),
            "strides": plane.strides,
        }

    return np.asarray(Moved())
