"""Tiles made on a CUDA device, of images on the host or on the device, and left there.

The tiles wait for nobody: the kernel is queued on the runtime's stream, and the vision graph behind
it.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import DeviceError, ImageError
from internvl_edge.bundle.quoting import reason
from internvl_edge.kernels.build import BuildError, cuda_binary
from internvl_edge.kernels.cuda import TILING_SOURCE, CudaKernels
from internvl_edge.kernels.device import DeviceArray, describe, producer_stream
from internvl_edge.kernels.images import planes_of
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.images.decode import check_array, load_pixels
from internvl_edge.runtime.images.preprocess import Content, Tiling, content_of, tile_on_host
from internvl_edge.runtime.images.sources import ImageLike

#: The kernel writes four neighbours at a time.
SIDE_MULTIPLE = 4

_log = logging.getLogger("internvl_edge")


class DeviceTiler:
    """The tiler of the CUDA device; see `preprocess.Tiler`.

    Args:
        cuda: whose stream the kernels are queued on.
        kernels: None cuts tiles on the host: the same bits, only slower.
    """

    def __init__(self, cuda: Cuda, kernels: CudaKernels | None) -> None:
        self._cuda = cuda
        self._kernels = kernels

    @classmethod
    def of(cls, cuda: Cuda) -> DeviceTiler:
        """Build the kernels, once per machine; without nvcc say so and do without."""
        try:
            cuda_binary(TILING_SOURCE)
        except BuildError as error:
            first = str(error).splitlines()[0]
            _log.warning("CUDA kernels not built: %s; images are tiled on the CPU", first)
            return cls(cuda, None)
        return cls(cuda, CudaKernels(cuda.driver))

    def __call__(self, image: ImageLike, tiling: Tiling) -> tuple[Any, Content]:
        """Cut an image into tiles.

        An image in device memory is read back to be hashed, so that it has the name it would have
        on the host: a picture seen before, here or there, is not encoded again. That costs one
        copy of the picture (25 MB at 4K) and the hash every picture on the host costs (13 ms there
        on an AMD EPYC), and may save the whole vision graph. The tiles would be as much to copy,
        and more for a small picture. The hash runs while the device cuts.

        Returns:
            uint8 `(tiles, tile_size, tile_size, 3)`, on the device where the kernels are; and
            what they were cut from.

        Raises:
            ImageError: see `load_image`; of an array in device memory also: another device, a mask,
                pixels with gaps between them.
        """
        on_device = hasattr(image, "__cuda_array_interface__")
        side = tiling.tile_size
        if self._kernels is None or side % SIDE_MULTIPLE:
            return tile_on_host(self._read(image) if on_device else image, tiling)
        pixels = self._read(image) if on_device else np.ascontiguousarray(load_pixels(image))
        columns, rows = tiling.grid(pixels.shape[1], pixels.shape[0])
        count = columns * rows + int(tiling.thumbnail and columns * rows > 1)
        with self._cuda.active():
            tiles = self._cuda.empty((count, side, side, 3), np.uint8)
            self._kernels.tile(
                image if on_device else pixels,
                columns=columns,
                rows=rows,
                tile_size=side,
                thumbnail=tiling.thumbnail,
                short_weights=tiling.short_weights,
                out=tiles,
                stream=self._cuda.stream,
            )
            if on_device:
                self._give_back(image)
        return tiles, content_of(pixels)

    def _checked(self, image: Any) -> NDArray[np.uint8]:
        """A description of a device array, its elements never to be read."""
        kind = type(image).__name__
        try:
            view = describe(image)
            masked = image.__cuda_array_interface__.get("mask") is not None
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError(
                f"{kind} has a damaged __cuda_array_interface__: {reason(error)}"
            ) from error
        check_array(view)
        try:
            planes_of(view, copy=False)
        except ValueError as error:
            raise ImageError(f"{kind}: {reason(error)}") from error
        if masked:
            raise ImageError(f"{kind} has a mask; pass an array without one")
        attributes = self._cuda.driver.bindings.CUpointer_attribute
        ordinal = attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        try:
            device = int(self._cuda.driver("cuPointerGetAttribute", ordinal, view.ctypes.data))
        except DeviceError as error:
            raise ImageError(
                f"{kind} is not in memory the device knows: {reason(error)}"
            ) from error
        if device != self._cuda.device:
            raise ImageError(
                f"the image is on CUDA device {device}, the model on {self._cuda.device}; copy it"
                " there first"
            )
        return view

    def _give_back(self, image: Any) -> None:
        """Let the caller write to the image again: in its stream's order, else when we return."""
        producer = producer_stream(image)
        if producer is None:
            self._cuda.synchronize()
        else:
            self._cuda.done_before(producer)

    def _read(self, image: Any) -> NDArray[np.uint8]:
        """A device image's pixels `(H, W, 3)` on the host, checked."""
        with self._cuda.active():
            view = self._checked(image)
            producer = producer_stream(image)
            if producer is not None:
                self._cuda.wait_for(producer)
            height, width, channels = view.shape
            row = width * channels
            pitch = view.strides[0] if height > 1 else row
            size = (height - 1) * pitch + row  # the last row may end where the memory does
            source = DeviceArray.view(self._cuda.driver, (size,), np.uint8, view.ctypes.data)
            host = np.empty(height * pitch, np.uint8)
            self._cuda.download(source, host[:size])
            self._cuda.synchronize()
        rows = host.reshape(height, pitch)[:, :row]
        return np.ascontiguousarray(rows).reshape(height, width, channels)
