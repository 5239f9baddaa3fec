"""From a picture that Pillow has opened to RGB pixels, in memory that is known before."""

from __future__ import annotations

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
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):
        stop = min(top + rows, height)
        pixels[top:stop] = _to_rgb(image.crop((0, top, width, stop)))
    return pixels


def decoding_bytes(image: Image.Image, scale: int = 1) -> int:
    """What decoding takes at its peak: told by the header, before any pixel is there.

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
    """Whether pixels are there: Pillow calls them `im`, from version 11 on `_im`."""
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


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255; keep the top eight bits instead.
        wide = np.asarray(image).clip(0, 65535)
        grey = (wide >> 8).astype(np.uint8)
        return np.repeat(grey[..., np.newaxis], 3, axis=2)
    return np.asarray(image.convert("RGB"))
