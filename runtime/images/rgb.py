"""From a picture that Pillow has opened to RGB pixels, in memory that is known before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageMode

from internvl_edge.bundle.errors import ImageError
from internvl_edge.runtime.free_memory import RESERVE_BYTES, available_memory

#: Most memory decoding may take, whatever the machine has: 153 Mpx of RGB, 89 in WebP.
DECODING_BYTES = 1 << 30
#: Pixels are converted in strips of so many bytes of RGB.
STRIP_BYTES = 4 << 20
#: Bytes a pixel that a decoder holds until the end: the picture in the format's own layout.
_WHOLE_PICTURE = {"WEBP": 9, "AVIF": 3, "JPEG2000": 16}
#: Bytes of a coefficient; a progressive JPEG is read whole before the first pixel is made.
_COEFFICIENT = 2
#: What sides of a JPEG may be divided by while it is decoded.
_SCALES = (1, 2, 4, 8)


def rgb_pixels(image: Image.Image, label: str) -> NDArray[np.uint8]:
    """Decode a picture to uint8 `(H, W, 3)`.

    A JPEG that would take more than `DECODING_BYTES` is decoded at a half, a quarter or an eighth
    of its sides: by its header alone, so that it is the same wherever and whenever it is decoded.

    Raises:
        ImageError: decoding takes more memory than that, or than is free.
    """
    scale = _scale(image)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    needed = decoding_bytes(image, scale)
    _check_memory(image, label, needed)
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    if image.mode.startswith(("I", "F")):
        _put_grey(image, pixels)
    else:
        for rows, strip in _strips(image):
            pixels[rows] = np.asarray(strip.convert("RGB"))
    return pixels


def decoding_bytes(image: Image.Image, scale: int = 1) -> int:
    """Return the peak bytes of decoding: told by the header, before any pixel is there.

    Args:
        image: opened.
        scale: what its sides are divided by already.
    """
    pixels = image.width * image.height
    if _is_decoded(image):
        return 3 * pixels
    mode = ImageMode.getmode(image.mode)
    # Pillow stores one channel as it is, and several as four.
    stored = np.dtype(mode.typestr).itemsize if len(mode.bands) == 1 else 4
    coefficients = 0
    if image.info.get("progressive"):
        coefficients = _COEFFICIENT * len(mode.bands) * pixels * scale**2
    beside = _WHOLE_PICTURE.get(image.format or "", 0)
    return pixels * (stored + beside) + max(3 * pixels, coefficients)


def _is_decoded(image: Image.Image) -> bool:
    """Tell whether pixels are there: Pillow calls them `im`, from version 11 on `_im`."""
    held = vars(image)
    return held.get("_im", held.get("im")) is not None


def _scale(image: Image.Image) -> int:
    """The least division of a JPEG's sides that brings it below the limit; 1 of anything else."""
    if image.format != "JPEG" or _is_decoded(image):
        return 1
    whole = decoding_bytes(image)
    return next((s for s in _SCALES if whole <= DECODING_BYTES * s**2), _SCALES[-1])


def _check_memory(image: Image.Image, label: str, needed: int) -> None:
    what = f"decoding {label} ({image.width} x {image.height} pixels, {image.mode})"
    if needed > DECODING_BYTES:
        raise ImageError(
            f"{what} takes {needed >> 20} MiB of memory, the limit is {DECODING_BYTES >> 20}; scale"
            " it down first"
        )
    if needed < STRIP_BYTES:
        return  # not worth the question
    free = available_memory() - RESERVE_BYTES
    if needed > free:
        raise ImageError(
            f"{what} takes {needed >> 20} MiB of memory, {max(free, 0) >> 20} are free; scale it"
            " down first, or close other programs"
        )


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Cut a decoded picture into strips of rows, of `STRIP_BYTES` of RGB each."""
    rows = max(1, STRIP_BYTES // (3 * image.width))
    for top in range(0, image.height, rows):
        stop = min(top + rows, image.height)
        yield slice(top, stop), image.crop((0, top, image.width, stop))


def _put_grey(image: Image.Image, pixels: NDArray[np.uint8]) -> None:
    """Bring one channel of more than 8 bits to 8, by what it holds: never all black.

    Twelve bits in a file of sixteen are usual, and floats between 0 and 1: the values themselves
    say how many bits are used. Pillow's own conversion clips them at 255.

    Args:
        pixels: uint8 `(H, W, 3)`, written.

    Raises:
        ImageError: values are no finite numbers.
    """
    largest = max(float(np.asarray(strip).max()) for _, strip in _strips(image))
    if not np.isfinite(largest):
        raise ImageError("a picture of floats holds values that are no finite numbers")
    bits = max(int(largest).bit_length(), 8)
    unit = 1.0 if image.mode == "F" and largest <= 1 else float(2**bits - 1)
    for rows, strip in _strips(image):
        wide = np.asarray(strip).clip(0)
        if image.mode == "F":
            grey = np.nan_to_num(wide * (255 / unit)).round().clip(0, 255)
        else:
            grey = wide >> (bits - 8)
        pixels[rows] = grey.astype(np.uint8)[..., np.newaxis]
