"""Images to tiles, exactly as InternVL does it (spec: Chen et al. 2024, arXiv:2404.16821, 3.1).

`load_pixels` decodes anything to 8-bit RGB, `select_grid` chooses columns x rows, `tile_image`
resizes and cuts. Tiles stay uint8: normalisation is part of the vision graph. Resizing and cutting
are done by the CPU kernel (`kernels/`), built on first use, or by Pillow where it cannot be built.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from internvl_edge.bundle.errors import ImageError
from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.kernels import ops
from internvl_edge.runtime.images.rgb import rgb_pixels

ImageLike: TypeAlias = (
    "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8] | DeviceImage | EncodedBytes"
)

#: Pixels above which an image is refused before it is decoded: where Pillow stops as well (two
#: times the 89 Mpx at which it warns). A 40-tile grid shows 8 Mpx, so nothing is gained beyond.
MAX_PIXELS = 178_956_970
#: Longest side, JPEG's own limit. Resizing goes one axis at a time, so that the picture between
#: the passes is as high as the original, however thin that was.
MAX_SIDE = 65_535
#: Largest file: as many pixels of four times 16 bits, not compressed.
MAX_BYTES = 8 * MAX_PIXELS


@dataclass(frozen=True)
class EncodedBytes:
    """An encoded image in memory, and how messages call it."""

    data: bytes
    label: str


class DeviceImage(Protocol):
    """An image in CUDA memory: uint8 `(H, W, 3)` of torch, CuPy, PyCUDA, Numba, `DeviceArray`."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Tiling:
    """How an image is cut: with its pixels, all that its tiles depend on.

    Attributes:
        tile_size: side of a tile in pixels.
        min_tiles, max_tiles: bounds of the grid's size, thumbnail not counted.
        thumbnail: whether the whole image comes last where there is more than one tile.
    """

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Choose `(columns, rows)`; see `select_grid`."""
        return select_grid(
            width,
            height,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            tile_size=self.tile_size,
        )


class Tiler(Protocol):
    """Makes tiles of an image, where the backend takes them."""

    def __call__(self, image: ImageLike, tiling: Tiling) -> tuple[Any, bytes]:
        """Tiles uint8 `(tiles, tile_size, tile_size, 3)`, and 32 bytes that name the pixels."""


def tile_on_host(image: ImageLike, tiling: Tiling) -> tuple[NDArray[np.uint8], bytes]:
    """Cut an image on the CPU; see `load_pixels` and `tile_image`."""
    pixels = load_pixels(image)
    tiles = tile_image(
        pixels,
        tile_size=tiling.tile_size,
        min_tiles=tiling.min_tiles,
        max_tiles=tiling.max_tiles,
        thumbnail=tiling.thumbnail,
    )
    return tiles, content_hash(pixels)


def tiles_on_host(tiles: Any) -> NDArray[np.uint8]:
    """Any tiler's tiles as a NumPy array."""
    return tiles if isinstance(tiles, np.ndarray) else tiles.to_host()


def load_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `source` to an RGB image; see `load_pixels`."""
    return Image.fromarray(np.ascontiguousarray(load_pixels(source, max_pixels=max_pixels)))


def load_pixels(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode `source` to RGB the way the reference does.

    Args:
        source: path, encoded bytes, `PIL.Image` or uint8 array `(H, W, 3)`.
        max_pixels: width * height above which the image is refused without decoding it.

    Returns:
        uint8 `(H, W, 3)`; an array is not copied. Alpha is dropped, not blended; palettes are
        expanded; grey is replicated; 16-bit grey is scaled to 8 bits; of an animation the first
        frame is taken. EXIF orientation is not applied (the reference does not).

    Raises:
        ImageError: unreadable, truncated, empty or too large, for the limits or for the memory.
    """
    if isinstance(source, np.ndarray):
        check_array(source, max_pixels)
        return np.asarray(source)
    if isinstance(source, Image.Image):
        return _pixels(source, "image", max_pixels)
    given = encoded_image(source)
    if isinstance(given, EncodedBytes):
        return _decode(given, max_pixels)
    if hasattr(source, "__cuda_array_interface__"):
        raise ImageError(
            f"an image in device memory ({type(source).__name__}) needs device='cuda'; load the"
            " model so, or copy the image to the host"
        )
    raise ImageError(
        f"an image is a path, bytes, PIL.Image or uint8 array, not {type(source).__name__}"
    )


def encoded_image(source: ImageLike) -> ImageLike:
    """Read a path and copy bytes that may change, once; anything else is returned as it is.

    Raises:
        ImageError: the file cannot be read, or is none.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return EncodedBytes(bytes(source), f"{len(source)} bytes of image data")
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        return EncodedBytes(read_bytes(source, MAX_BYTES), named(source))
    except OSError as error:
        raise ImageError(f"cannot read image {quoted(str(source))}: {reason(error)}") from error


def _decode(source: EncodedBytes, max_pixels: int) -> NDArray[np.uint8]:
    stream, label = io.BytesIO(source.data), source.label
    if not source.data:
        raise ImageError(f"{label} is empty (0 bytes); expected an encoded image")
    try:
        with warnings.catch_warnings():
            # Of many pixels (the limit here is checked) and of oddities that Pillow gets over.
            warnings.simplefilter("ignore")
            with Image.open(stream) as image:
                return _pixels(image, label, max_pixels)
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


def content_hash(pixels: NDArray[np.uint8]) -> bytes:
    """sha256 of the size and pixels of RGB `(H, W, 3)`: equal for equal content, whatever file."""
    digest = hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[0]}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def select_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int, tile_size: int
) -> tuple[int, int]:
    """Choose `(columns, rows)` for an image, by closest aspect ratio.

    Candidates are tried by ascending area. Exact ties in double precision go to the larger grid
    when the image has more than half of its pixels: strictly more, in candidate order, as the
    reference computes it.
    """
    candidates = sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles // columns + 1)
            if columns * rows >= min_tiles
        ),
        key=lambda grid: grid[0] * grid[1],
    )
    ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidates:
        distance = abs(ratio - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * tile_size**2 * columns * rows:
            best = (columns, rows)
    return best


def tile_image(
    image: Image.Image | NDArray[np.uint8],
    *,
    tile_size: int,
    min_tiles: int = 1,
    max_tiles: int,
    thumbnail: bool = True,
) -> NDArray[np.uint8]:
    """Cut an RGB image, or its pixels uint8 `(H, W, 3)`, into tiles.

    Returns:
        uint8 `(tiles, tile_size, tile_size, 3)`, row-major; when there is more than one tile and
        `thumbnail` is set, the whole image squashed to one tile comes last.
    """
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    columns, rows = select_grid(
        width, height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size
    )
    if ops.cpu_kernels() is not None:
        return ops.tile(
            pixels,
            columns=columns,
            rows=rows,
            tile_size=tile_size,
            thumbnail=thumbnail,
        )
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    grid = np.asarray(resize(picture, columns * tile_size, rows * tile_size))
    # (rows * S, columns * S, 3) -> (rows, S, columns, S, 3) -> (rows * columns, S, S, 3)
    tiles = (
        grid.reshape(rows, tile_size, columns, tile_size, 3)
        .swapaxes(1, 2)
        .reshape(rows * columns, tile_size, tile_size, 3)
    )
    if thumbnail and columns * rows > 1:
        whole = np.asarray(resize(picture, tile_size, tile_size))
        tiles = np.concatenate([tiles, whole[np.newaxis]])
    return np.ascontiguousarray(tiles)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Antialiased bicubic resize, horizontal pass first, 8-bit intermediate.

    Two calls, one per axis, fix the order of the passes: Pillow up to 12 always went horizontally
    first, Pillow 13 chooses, and the released models were trained with the former.
    """
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


def check_array(array: NDArray[Any], max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError unless an array is an image: uint8 `(H, W, 3)`, not too large."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"an image array is uint8 of shape (H, W, 3), not {named(str(array.dtype))}"
            f" {quoted(array.shape)}"
        )
    _check_pixels((array.shape[1], array.shape[0]), max_pixels, "image array")


def check_tiles(tiles: object, tile_size: int) -> None:
    """Raise ImageError unless this is uint8 `(tiles, tile_size, tile_size, 3)`."""
    side = (tile_size, tile_size, 3)
    if not isinstance(tiles, np.ndarray):
        got = type(tiles).__name__
    elif tiles.dtype == np.uint8 and tiles.ndim == 4 and tiles.shape[1:] == side:
        return
    else:
        got = f"{named(str(tiles.dtype))} {quoted(tiles.shape)}"
    raise ImageError(
        f"tiles are uint8 of shape (tiles, {tile_size}, {tile_size}, 3), as `tile` cuts them, not"
        f" {got}"
    )


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


def _pixels(image: Image.Image, label: str, max_pixels: int) -> NDArray[np.uint8]:
    _check_pixels(image.size, max_pixels, label)
    try:
        return rgb_pixels(image, label)
    except ImageError:
        raise
    except Exception as error:  # see `_decode`
        raise ImageError(f"{label} cannot be decoded: {reason(error)}") from error
