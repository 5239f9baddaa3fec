"""Input images of the tiling kernel: packed RGB, BGR and RGBA, and the NV12 cameras deliver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.jobs import FORMATS, MATRICES, MAX_SIDE, ImageStruct, choose

PIXEL_BYTES = {"rgb": 3, "bgr": 3, "rgba": 4}


@dataclass(frozen=True)
class Planes:
    """A checked image: its planes with any row stride, pixels of a row adjacent."""

    pixels: NDArray[np.uint8]  # (H, W, 3 or 4); of NV12 luma (H, W)
    chroma: NDArray[np.uint8] | None  # NV12: (ceil(H / 2), 2 * ceil(W / 2)), U and V in turn
    pixel_format: str
    matrix: str

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    def struct(self) -> ImageStruct:
        """Addresses are valid while this object lives."""
        image = ImageStruct()
        image.pixels, image.stride = self.pixels.ctypes.data, self.pixels.strides[0]
        if self.chroma is not None:
            image.chroma, image.chroma_stride = self.chroma.ctypes.data, self.chroma.strides[0]
        image.width, image.height = self.width, self.height
        image.format, image.matrix = FORMATS[self.pixel_format], MATRICES[self.matrix]
        return image


def planes_of(
    image: Any, pixel_format: str = "rgb", matrix: str = "bt601", *, copy: bool = True
) -> Planes:
    """Check an image and split it into planes; nothing is copied unless a row has gaps.

    Args:
        image: uint8. "rgb", "bgr": `(H, W, 3)`; "rgba": `(H, W, 4)`, alpha is dropped; "nv12":
            `(H * 3 / 2, W)` as OpenCV lays it out, or the planes `(luma (H, W), chroma)` with
            chroma `(ceil(H / 2), 2 * ceil(W / 2))`, each with its own row stride.
        pixel_format: "rgb", "bgr", "rgba" or "nv12".
        matrix: of NV12, ITU-R video range (16..235) both: "bt601", the default of most cameras'
            drivers, or "bt709", which HD streams declare. A chroma sample covers 2 x 2 pixels.
        copy: False refuses an image whose rows have gaps instead of copying it.

    Raises:
        TypeError: not uint8.
        ValueError: another shape, no pixels, an unknown format or matrix.
    """
    choose("pixel_format", pixel_format, FORMATS)
    choose("matrix", matrix, MATRICES)
    if pixel_format == "nv12":
        return _nv12(image, matrix, copy)
    pixels = _bytes(image, pixel_format)
    if pixels.ndim != 3 or pixels.shape[2] != PIXEL_BYTES[pixel_format]:
        raise ValueError(
            f"a {pixel_format} image has shape (H, W, {PIXEL_BYTES[pixel_format]}), not"
            f" {pixels.shape}; name its pixel_format"
        )
    _check_sides(pixels.shape[1], pixels.shape[0])
    return Planes(_with_whole_rows(pixels, copy), None, pixel_format, matrix)


def _nv12(image: Any, matrix: str, copy: bool) -> Planes:
    if isinstance(image, tuple):
        if len(image) != 2:
            raise ValueError(f"an nv12 image is (luma, chroma), not {len(image)} planes")
        luma, chroma = (_bytes(plane, "nv12") for plane in image)
    else:
        whole = _bytes(image, "nv12")
        if whole.ndim != 2 or whole.shape[0] % 3 or whole.shape[1] % 2:
            raise ValueError(
                f"an nv12 image has shape (H * 3 / 2, W) of even sides, not {whole.shape};"
                " pass (luma, chroma) for odd sides"
            )
        height = whole.shape[0] // 3 * 2
        luma, chroma = whole[:height], whole[height:]
    if luma.ndim != 2:
        raise ValueError(f"an nv12 luma plane has shape (H, W), not {luma.shape}")
    _check_sides(luma.shape[1], luma.shape[0])
    expected = ((luma.shape[0] + 1) // 2, (luma.shape[1] + 1) // 2 * 2)
    if chroma.shape != expected:
        raise ValueError(f"the chroma plane has shape {chroma.shape}, expected {expected}")
    return Planes(_with_whole_rows(luma, copy), _with_whole_rows(chroma, copy), "nv12", matrix)


def _bytes(image: Any, pixel_format: str) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"a {pixel_format} image is a uint8 array, not {got}")
    return image


def _check_sides(width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ValueError(f"the image is {width} x {height} pixels, sides must be 1..{MAX_SIDE}")


def _with_whole_rows(plane: NDArray[np.uint8], copy: bool) -> NDArray[np.uint8]:
    """The plane itself where its rows are gapless and go down, else a contiguous copy."""
    row = int(np.prod(plane.shape[1:]))
    if plane[:1].flags.c_contiguous and (len(plane) == 1 or plane.strides[0] >= row):
        return plane
    if not copy:
        raise ValueError(f"rows have gaps or go up (strides {plane.strides}); copy the image first")
    return np.ascontiguousarray(plane)
