"""CUDA memory and streams through cuda-python's driver bindings, as little as the kernels need.

Device arrays of any framework come in by `__cuda_array_interface__`, streams as integer handles or
as the objects of torch, CuPy, PyCUDA and cuda.core.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Event flags: no time stamp, so that recording costs less.
EVENT_WITHOUT_TIME = 2
#: How the driver names the legacy default stream where 0 would mean "none".
LEGACY_STREAM = 1

_REMEDIES = {
    2: "use fewer tiles, a smaller max_context, or a bundle of lower precision",
    100: "there is no NVIDIA GPU here, or CUDA_VISIBLE_DEVICES hides it",
    209: "the kernels were not built for this GPU; build them with a newer CUDA toolkit",
    803: "the driver and the CUDA libraries do not fit together; update the driver",
}
_NO_REMEDY = "see the reason's name in the CUDA driver API's list of errors"


class CudaError(RuntimeError):
    """The CUDA driver is missing or refused a call; the message names the call and the reason."""


class Driver:
    """`cuda.bindings.driver` with every status checked; a call returns what follows the status.

    Args:
        bindings: the module, or what stands in for it.
        failure: the exception a refused call raises.
    """

    def __init__(self, bindings: Any, failure: type[Exception] = CudaError) -> None:
        self.bindings = bindings
        self.failure = failure

    @classmethod
    def open(cls, failure: type[Exception] = CudaError) -> Driver:
        """Import the bindings and initialise the driver.

        Raises:
            failure: no cuda-python, no driver, or no device.
        """
        try:
            from cuda.bindings import driver as bindings
        except ImportError as error:
            raise failure(
                "CUDA needs cuda-python: pip install 'internvl-edge[gpu]', or use the CPU"
            ) from error
        driver = cls(bindings, failure)
        driver("cuInit", 0)
        return driver

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            answer = getattr(self.bindings, name)(*arguments)
        except RuntimeError as error:
            raise self._unloaded(name, error) from error
        return self._values(name, answer)

    def acquire(self, make: str, release: str, *arguments: Any) -> Acquired:
        """Call `make` in the current context; what it makes goes back by `release`.

        Between the driver's answer and its being held, Python looks for no interrupt: one finds
        nothing made, or something that will be given back.
        """
        made = Acquired(self, self.context(), release)
        try:
            made.answers.extend(starmap(getattr(self.bindings, make), (arguments,)))
        except RuntimeError as error:
            raise self._unloaded(make, error) from error
        made.handle = self._values(make, made.answers[0])
        return made

    def _unloaded(self, name: str, error: RuntimeError) -> Exception:
        """The bindings load libcuda at the first call."""
        reason = " ".join(str(error).split()).rstrip(".")
        return self.failure(f"{name}: {reason}; install an NVIDIA driver, or use the CPU")

    def _values(self, name: str, answer: Any) -> Any:
        status, *values = answer
        if int(status) != 0:
            reason = getattr(status, "name", status)
            remedy = _REMEDIES.get(int(status), _NO_REMEDY)
            raise self.failure(f"{name} failed: {reason} ({int(status)}); {remedy}")
        return values[0] if len(values) == 1 else tuple(values)

    def context(self) -> int:
        """The handle of the current context; the first device's primary one if there is none.

        torch and the CUDA runtime work in the primary context, PyCUDA makes its own current.
        """
        current = int(self("cuCtxGetCurrent"))
        if current:
            return current
        context = self("cuDevicePrimaryCtxRetain", self("cuDeviceGet", 0))
        self("cuCtxSetCurrent", context)
        return int(context)

    @contextmanager
    def in_context(self, context: int) -> Iterator[None]:
        """Make a context the calling thread's current one for a while."""
        self("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self("cuCtxPopCurrent")

    def order(self, first: int, then: int) -> None:
        """Make what comes on stream `then` wait for what is on `first`; the host does not wait."""
        if (first or LEGACY_STREAM) == (then or LEGACY_STREAM):
            return
        event = self.acquire("cuEventCreate", "cuEventDestroy", EVENT_WITHOUT_TIME)
        self("cuEventRecord", event.handle, first)
        self("cuStreamWaitEvent", then, event.handle, 0)
        event.release()  # the driver keeps it until it has happened

    def address_on_device(self, array: NDArray[Any]) -> int | None:
        """Return the address at which the device reads pinned or managed host memory; else None."""
        attribute = self.bindings.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
        try:
            return int(self("cuPointerGetAttribute", attribute, array.ctypes.data)) or None
        except self.failure:  # the driver does not know pageable memory
            return None


class Acquired:
    """Something of the driver's, given back when nobody refers to it any more, or by `release`.

    Not when the process ends: the driver may be gone by then, and this with it.

    Args:
        driver: makes it, and takes it back.
        context: where.
        release: the call that takes it back.

    Attributes:
        handle: of it.
        answers: the driver's, once it has made it.
        release: gives it back now, once.
    """

    handle: Any

    def __init__(self, driver: Driver, context: int, release: str) -> None:
        self.answers: list[Any] = []
        self.release = weakref.finalize(self, _release, driver, context, release, self.answers)
        self.release.atexit = False


class DeviceArray:
    """An array in device memory, C-contiguous: of its own, freed with it, or part of another's."""

    def __init__(self, driver: Driver, shape: tuple[int, ...], dtype: Any) -> None:
        self._driver, self.shape, self.dtype = driver, shape, np.dtype(dtype)
        self._context = driver.context()
        self._memory: Acquired | None = driver.acquire(
            "cuMemAlloc", "cuMemFree", max(self.nbytes, 1)
        )
        self.address = int(self._memory.handle)
        self._whole: DeviceArray | None = None  # whose memory this is part of

    @classmethod
    def of(cls, driver: Driver, array: NDArray[Any]) -> DeviceArray:
        """A copy of a host array.

        From pageable memory the driver may return before the bytes have arrived, and a stream that
        does not wait for the default one would read too early: hence the wait.
        """
        copied, whole = cls(driver, array.shape, array.dtype), np.ascontiguousarray(array)
        driver("cuMemcpyHtoD", copied.address, whole.ctypes.data, whole.nbytes)
        driver("cuStreamSynchronize", 0)
        return copied

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
        }

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Some neighbours along the first axis, in the same memory."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows of a device array are neighbours, not every {step}th")
        begin = self.address + start * (self.nbytes // max(len(self), 1))
        return self._part((max(stop - start, 0), *self.shape[1:]), begin)

    def of_shape(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return the same memory in another shape."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} cannot be seen as {shape}: sizes differ")
        return self._part(shape, self.address)

    def _part(self, shape: tuple[int, ...], address: int) -> DeviceArray:
        part = DeviceArray.view(self._driver, shape, self.dtype, address)
        part._whole = self if self._whole is None else self._whole
        return part

    @classmethod
    def view(cls, driver: Driver, shape: tuple[int, ...], dtype: Any, address: int) -> DeviceArray:
        """Memory that belongs to somebody else and outlives this array."""
        array = object.__new__(cls)
        array._driver, array._context = driver, driver.context()
        array.shape, array.dtype, array.address = shape, np.dtype(dtype), address
        array._whole = array._memory = None
        return array

    def to_host(self) -> NDArray[Any]:
        """Wait for the device and copy back."""
        host = np.empty(self.shape, self.dtype)
        with self._driver.in_context(self._context):
            self._driver("cuCtxSynchronize")
            self._driver("cuMemcpyDtoH", host.ctypes.data, self.address, self.nbytes)
        return host

    def free(self) -> None:
        """Give the memory back now, if it is the array's own; do not use it or its parts again."""
        if self._memory is not None:
            self._memory.release()


class Scratch:
    """Device memory that grows, one per context and stream: reuse follows the stream's order."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._held: dict[tuple[int, int], DeviceArray] = {}

    def get(self, context: int, stream: int, size: int) -> int:
        """At least `size` bytes; valid until the next call for the same stream."""
        place = context, stream
        if place in self._held and self._held[place].nbytes < size:
            self._driver("cuStreamSynchronize", stream)
            del self._held[place]  # freed with the array, so that it has no name by then
        if place not in self._held:
            self._held[place] = DeviceArray(self._driver, (size,), np.uint8)
        return self._held[place].address


def _release(driver: Driver, context: int, call: str, answers: Sequence[Any]) -> None:
    for status, handle in answers:
        if int(status) == 0:
            with driver.in_context(context):
                driver(call, handle)


class _Described:
    """An object that describes memory to NumPy by address, shape and strides."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def describe(array: Any) -> NDArray[Any]:
    """A NumPy array over a device array's address: its shape and strides may be looked at, its
    elements are not in host memory and must never be read."""
    interface = array.__cuda_array_interface__
    return np.asarray(
        _Described(
            {
                "shape": tuple(interface["shape"]),
                "typestr": interface["typestr"],
                "data": interface["data"],
                "strides": interface.get("strides"),
                "version": 3,
            }
        )
    )


def producer_stream(array: Any) -> int | None:
    """The stream a device array's pending work is on; None: there is none to wait for.

    Version 3 of the interface says so. Older ones, torch's among them, do not: the default stream
    is taken, on which torch works unless told otherwise.
    """
    interface = array.__cuda_array_interface__
    if interface.get("version", 0) < 3:
        return LEGACY_STREAM
    stream = interface.get("stream")
    return int(stream) if stream else None


def stream_handle(stream: Any) -> int:
    """The integer handle of a stream: an int, None (the default stream), or a framework's object.

    Raises:
        TypeError: none of these.
    """
    if stream is None:
        return 0
    if hasattr(stream, "__cuda_stream__"):  # cuda.core's protocol: (version, handle)
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, PyCUDA
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    try:
        return int(stream)
    except (TypeError, ValueError):
        raise TypeError(
            f"a stream is an integer handle or a torch, CuPy, PyCUDA or cuda.core stream,"
            f" not {type(stream).__name__}"
        ) from None
