"""Whatever a picture is given as, decoded to 8-bit RGB the way the reference does."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from internvl_edge.bundle.errors import FrameWarning, ImageError
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.runtime.images.formats import choose_frame, open_picture
from internvl_edge.runtime.images.rgb import rgb_pixels
from internvl_edge.runtime.images.sources import (
    MAX_PIXELS,
    EncodedBytes,
    ImageLike,
    Picture,
    encoded_image,
)

#: Longest side, JPEG's own limit. Resizing goes one axis at a time, so that the picture between
#: the passes is as high as the original, however thin that was.
MAX_SIDE = 65_535

#: What turns a picture upright, by its orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `source` to an RGB image; see `load_pixels`."""
    return Image.fromarray(np.ascontiguousarray(load_pixels(source, max_pixels=max_pixels)))


def load_pixels(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode `source` to RGB the way the reference does.

    Args:
        source: path, `file:` or `data:` URI, encoded bytes or base64, `PIL.Image`, uint8 array
            `(H, W, 3)`, `(H, W, 4)`, `(H, W, 1)` or `(H, W)`, or a `Picture` of one of them.
        max_pixels: width * height above which the image is refused without decoding it.

    Returns:
        uint8 `(H, W, 3)`; an array of that shape is not copied. Alpha is dropped, not blended;
        palettes are expanded; grey is replicated; wide grey is scaled to 8 bits by its content; of
        several frames or pages the first is taken, with a `FrameWarning`. EXIF orientation is not
        applied (the reference does not) unless a `Picture` asks for it.

    Raises:
        ImageError: unreadable, truncated, empty or too large, for the limits or for the memory.
    """
    how = source if isinstance(source, Picture) else Picture(source)
    given = encoded_image(how.source)
    if isinstance(given, EncodedBytes):
        return _decode(given, how, max_pixels)
    if isinstance(given, np.ndarray):
        return rgb_array(given, max_pixels)
    if isinstance(given, Image.Image):
        return _opened_by_caller(given, how, max_pixels)
    if hasattr(given, "__cuda_array_interface__"):
        raise ImageError(
            f"an image in device memory ({type(given).__name__}) needs device='cuda'; load the"
            " model so, or copy the image to the host"
        )
    raise ImageError(
        "an image is a path, a URI, bytes, base64, PIL.Image or uint8 array, not"
        f" {type(given).__name__}"
    )


def rgb_array(array: NDArray[Any], max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the RGB of an image array `(H, W, 3)`; grey is replicated, alpha dropped.

    Raises:
        ImageError: another type or shape, channels first, or too large.
    """
    # (H, W) -> (H, W, 1)
    wide = array[..., np.newaxis] if array.ndim == 2 else array
    channels = wide.shape[2] if wide.ndim == 3 else 0
    if wide.dtype != np.uint8 or channels not in (1, 4):
        check_array(array, max_pixels)
        return np.asarray(array)
    _check_pixels((wide.shape[1], wide.shape[0]), max_pixels, "image array")
    # (H, W, 1 | 4) -> (H, W, 3)
    return np.repeat(wide, 3, axis=2) if channels == 1 else np.ascontiguousarray(wide[..., :3])


def check_array(array: NDArray[Any], max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError unless an array is an image: uint8 `(H, W, 3)`, not too large."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        remedy = ""
        if array.dtype != np.uint8:
            remedy = "; scale its values to 0..255 and convert it"
        elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
            remedy = "; channels come last: transpose(1, 2, 0)"
        raise ImageError(
            f"an image array is uint8 of shape (H, W, 3), not {named(str(array.dtype))}"
            f" {quoted(array.shape)}{remedy}"
        )
    _check_pixels((array.shape[1], array.shape[0]), max_pixels, "image array")


def _decode(source: EncodedBytes, how: Picture, max_pixels: int) -> NDArray[np.uint8]:
    label = source.label
    if not source.data:
        raise ImageError(f"{label} is empty (0 bytes); expected an encoded image")
    try:
        with warnings.catch_warnings():
            # Of many pixels (the limit here is checked) and of oddities that Pillow gets over.
            warnings.simplefilter("ignore")
            with open_picture(io.BytesIO(source.data), label, how.frame) as opened:
                pixels = _pixels(opened.image, label, how.upright, max_pixels)
                frames = opened.frames
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{label} has too many pixels: {reason(error)}; scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{label} is not an image Pillow can identify") from error
    except Exception as error:  # a decoder at damaged data raises whatever it stumbles over
        raise ImageError(f"{label} cannot be decoded: {reason(error)}") from error
    if frames > 1 and how.frame is None:
        warnings.warn(
            f"{label} has {frames} frames, the first is taken; 'frame' chooses another, from 0",
            FrameWarning,
            stacklevel=2,
        )
    return pixels


def _opened_by_caller(image: Image.Image, how: Picture, max_pixels: int) -> NDArray[np.uint8]:
    """Decode what the caller opened, at the frame where it stands unless another is asked for."""
    try:
        choose_frame(image, "image", how.frame)
    except (OSError, EOFError, ValueError) as error:
        raise ImageError(f"image cannot be decoded: {reason(error)}") from error
    return _pixels(image, "image", how.upright, max_pixels)


def _pixels(image: Image.Image, label: str, upright: bool, max_pixels: int) -> NDArray[np.uint8]:
    _check_pixels(image.size, max_pixels, label)
    try:
        pixels = rgb_pixels(image, label)
        return _turned(pixels, image) if upright else pixels
    except ImageError:
        raise
    except Exception as error:  # see `_decode`
        raise ImageError(f"{label} cannot be decoded: {reason(error)}") from error


def _turned(pixels: NDArray[np.uint8], image: Image.Image) -> NDArray[np.uint8]:
    """Turn pixels as the EXIF orientation says (JEITA CP-3451, tag 0x0112)."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is None:
        return pixels
    return np.ascontiguousarray(Image.fromarray(pixels).transpose(turn))


def _check_pixels(size: tuple[int, int], max_pixels: int, label: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{label} has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{label} has {width} x {height} = {width * height} pixels, the limit is {max_pixels};"
            " scale it down first"
        )
    if max(size) > MAX_SIDE:
        raise ImageError(
            f"{label} is {width} x {height} pixels, the longest side allowed is {MAX_SIDE};"
            " scale it down or cut it first"
        )
