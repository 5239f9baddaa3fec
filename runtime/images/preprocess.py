"""Images to tiles, exactly as InternVL does it (spec: Chen et al. 2024, arXiv:2404.16821, 3.1).

`select_grid` chooses columns x rows, `tile_image` resizes and cuts. Tiles stay uint8: normalisation
is part of the vision graph. Resizing and cutting are done by the CPU kernel (`kernels/`), built on
first use; where it cannot be built by Pillow, or by NumPy for torchvision's pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.errors import ImageError
from internvl_edge.bundle.quoting import named, quoted
from internvl_edge.bundle.specs import Resize
from internvl_edge.kernels import ops
from internvl_edge.runtime.images.decode import load_pixels
from internvl_edge.runtime.images.sources import ImageLike


@dataclass(frozen=True)
class Tiling:
    """The cutting of an image: with its pixels, all that its tiles depend on.

    Attributes:
        tile_size: side of a tile in pixels.
        min_tiles, max_tiles: bounds of the grid's size, thumbnail not counted.
        thumbnail: whether the whole image comes last where there is more than one tile.
        resize: whose pixels the resized image has.
    """

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    resize: Resize = "pillow"

    @property
    def short_weights(self) -> bool:
        """Whether the resize rounds its weights to 16 bits; see `kernels.weights`."""
        return self.resize == "torchvision"

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Choose `(columns, rows)`; see `select_grid`."""
        return select_grid(
            width,
            height,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            tile_size=self.tile_size,
        )


@dataclass(frozen=True)
class Content:
    """What an image is before it is cut.

    Attributes:
        digest: 32 bytes that name its pixels.
        size: width and height in pixels; None: it was cut already.
    """

    digest: bytes
    size: tuple[int, int] | None


class Tiler(Protocol):
    """Makes tiles of an image, where the backend takes them."""

    def __call__(self, image: ImageLike, tiling: Tiling) -> tuple[Any, Content]:
        """Tiles uint8 `(tiles, tile_size, tile_size, 3)`, and what they were cut from."""


def tile_on_host(image: ImageLike, tiling: Tiling) -> tuple[NDArray[np.uint8], Content]:
    """Cut an image on the CPU; see `load_pixels` and `tile_image`."""
    pixels = load_pixels(image)
    tiles = tile_image(
        pixels,
        tile_size=tiling.tile_size,
        min_tiles=tiling.min_tiles,
        max_tiles=tiling.max_tiles,
        thumbnail=tiling.thumbnail,
        short_weights=tiling.short_weights,
    )
    return tiles, content_of(pixels)


def tiles_on_host(tiles: Any) -> NDArray[np.uint8]:
    """Any tiler's tiles as a NumPy array."""
    return tiles if isinstance(tiles, np.ndarray) else tiles.to_host()


def content_of(pixels: NDArray[np.uint8]) -> Content:
    """Size of RGB `(H, W, 3)`, and sha256 of it and the pixels: equal for equal content, whatever
    file."""
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"{width}x{height}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return Content(digest.digest(), (width, height))


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
    short_weights: bool = False,
) -> NDArray[np.uint8]:
    """Cut an RGB image, or its pixels uint8 `(H, W, 3)`, into tiles.

    Args:
        short_weights: resize as torchvision does; else as Pillow.

    Returns:
        uint8 `(tiles, tile_size, tile_size, 3)`, row-major; when there is more than one tile and
        `thumbnail` is set, the whole image squashed to one tile comes last.
    """
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    columns, rows = select_grid(
        width, height, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size
    )
    if short_weights or ops.cpu_kernels() is not None:
        return ops.tile(
            pixels,
            columns=columns,
            rows=rows,
            tile_size=tile_size,
            thumbnail=thumbnail,
            short_weights=short_weights,
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
