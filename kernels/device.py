"""CUDA memory and streams through cuda-python's driver bindings, as little as the kernels need.

Device arrays of any framework come in by `__cuda_array_interface__`, streams as integer handles or
as the objects of torch, CuPy, PyCUDA and cuda.core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


class CudaError(RuntimeError):
    """The CUDA driver is missing or refused a call; the message names the call and the reason."""


class Driver:
    """`cuda.bindings.driver` with every status checked; a call returns what follows the status."""

    def __init__(self, bindings: Any) -> None:
        self.bindings = bindings

    @classmethod
    def open(cls) -> Driver:
        """Import the bindings and initialise the driver.

        Raises:
            CudaError: no cuda-python, no driver, or no device.
        """
        try:
            from cuda.bindings import driver as bindings
        except ImportError as error:
            raise CudaError(
                "CUDA kernels need cuda-python: pip install 'internvl-edge[tensorrt]'"
            ) from error
        driver = cls(bindings)
        driver("cuInit", 0)
        return driver

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self.bindings, name)(*arguments)
        except RuntimeError as error:  # the bindings load libcuda at the first call
            raise CudaError(f"{name}: {error}; is an NVIDIA driver installed?") from error
        if int(status) != 0:
            reason = getattr(status, "name", status)
            raise CudaError(f"{name} failed: {reason} ({int(status)})")
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

    def upload(self, array: NDArray[Any]) -> int:
        """A copy of a host array in new device memory; its address.

        From pageable memory the driver may return before the bytes have arrived, and a stream that
        does not wait for the default one would read too early: hence the wait.
        """
        whole = np.ascontiguousarray(array)
        address = int(self("cuMemAlloc", max(whole.nbytes, 1)))
        self("cuMemcpyHtoD", address, whole.ctypes.data, whole.nbytes)
        self("cuStreamSynchronize", 0)
        return address

    def address_on_device(self, array: NDArray[Any]) -> int | None:
        """Where the device reads a host array in place: pinned or managed memory; else None."""
        attribute = self.bindings.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
        try:
            return int(self("cuPointerGetAttribute", attribute, array.ctypes.data)) or None
        except CudaError:  # the driver does not know pageable memory
            return None


@dataclass
class Scratch:
    """Device memory that grows, one per context and stream: reuse follows the stream's order."""

    driver: Driver
    sizes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def get(self, context: int, stream: int, size: int) -> int:
        """At least `size` bytes; valid until the next call for the same stream."""
        address, held = self.sizes.get((context, stream), (0, 0))
        if held < size:
            if address:
                self.driver("cuStreamSynchronize", stream)
                self.driver("cuMemFree", address)
                del self.sizes[context, stream]
            address = int(self.driver("cuMemAlloc", size))
            self.sizes[context, stream] = (address, size)
        return address


class DeviceArray:
    """An array in device memory of its own: for callers without a framework, and for tests."""

    def __init__(
        self, driver: Driver, shape: tuple[int, ...], dtype: Any, address: int | None = None
    ) -> None:
        self._driver, self.shape, self.dtype = driver, shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        driver.context()
        self.address = address or int(driver("cuMemAlloc", max(self.nbytes, 1)))

    @classmethod
    def of(cls, driver: Driver, array: NDArray[Any]) -> DeviceArray:
        """A copy of a host array."""
        driver.context()
        return cls(driver, array.shape, array.dtype, driver.upload(array))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
        }

    def to_host(self) -> NDArray[Any]:
        """Wait for the device and copy back."""
        host = np.empty(self.shape, self.dtype)
        self._driver("cuCtxSynchronize")
        self._driver("cuMemcpyDtoH", host.ctypes.data, self.address, self.nbytes)
        return host

    def free(self) -> None:
        """Give the memory back; the array must not be used afterwards."""
        self._driver("cuMemFree", self.address)


class _Described:
    """What NumPy reads to describe memory by address, shape and strides."""

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
    """The stream a device array's pending work is on, if its owner says."""
    stream = array.__cuda_array_interface__.get("stream")
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
