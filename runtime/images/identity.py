"""Images on their way into a prompt: cut into tiles, identified, encoded when needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.images.preprocess import Content, Tiling, tiles_on_host
from internvl_edge.runtime.images.sources import EncodedPicture

#: Makes the tiles of an image, and says what they were cut from.
Cut = Callable[[], tuple[Any, Content]]

_SIGN = np.iinfo(np.int64).min


@dataclass(frozen=True)
class ImageIdentity:
    """All that the rows of an image depend on: whatever is kept of an image is kept under it.

    Attributes:
        pixels: 32 bytes that name them.
        tiling: how they were cut; None: they are tiles already.
        tiles: how many there are.
        model: names what encodes them.
    """

    pixels: bytes
    tiling: Tiling | None
    tiles: int
    model: str

    @cached_property
    def digest(self) -> bytes:
        """32 bytes in which every field is."""
        return hashlib.sha256(repr(self).encode()).digest()

    def signatures(self, rows: int) -> NDArray[np.int64]:
        """One number `(rows,)` for each row, which names the image and the row's place in it.

        63 bits of a hash each, and others for each row: were two images ever to agree in one, they
        would not in the next. Token ids are not negative, so a negative number can never be one.
        """
        bits = hashlib.shake_256(self.digest).digest(8 * rows)
        return np.frombuffer(bits, "<i8") | _SIGN


class TiledImage:
    """An image cut into tiles, which can be had again whatever becomes of what the caller gave.

    Args:
        cut: makes the tiles.
        tiling: how it cuts.
        model: names what will encode them.
        picture: what `cut` reads, where that is held encoded; None: it reads what is the caller's.

    Attributes:
        tiles: how many there are.
        identity: of the image, in every cache.
        file: the picture by the file it came from; None: there was none.
        size: width and height of the whole image in pixels; None: it was given in tiles.
    """

    def __init__(
        self, cut: Cut, tiling: Tiling | None, model: str, picture: EncodedPicture | None = None
    ) -> None:
        self._cut: Cut | None = cut
        self._picture = picture
        self.file = None if picture is None else picture.file()
        self._held, content = cut()
        self.tiles = len(self._held)
        self.size = content.size
        self.identity = ImageIdentity(content.digest, tiling, self.tiles, model)

    def pixels(self) -> Any:
        """uint8 `(tiles, S, S, 3)` where the tiler made them; after `release`, the same again.

        Raises:
            ImageError: there is no memory to decode the image again.
        """
        held = self._held
        if held is None:
            assert self._cut is not None  # one of the two is always there
            held, _ = self._cut()
            self._held = held
        return held

    def release(self) -> None:
        """Keep only the encoded picture or its tiles on the host, whichever is smaller."""
        if self._held is None:
            return
        if self._picture is not None and len(self._picture.source.data) < self._held.nbytes:
            self._held = None
        else:
            self._held = tiles_on_host(self._held)
            self._cut = self._picture = None

    def kept(self) -> EncodedPicture | NDArray[np.uint8]:
        """Return what is held of the image: it encoded, or else its tiles `(tiles, S, S, 3)`."""
        return tiles_on_host(self.pixels()) if self._picture is None else self._picture


class HasRows(Protocol):
    """An encoding of an image."""

    rows: NDArray[np.floating] | None


class PendingImage:
    """An image of a prompt before it is encoded, and after; see `PromptImage`.

    Args:
        image: which.
        count: how many rows it takes.
    """

    def __init__(self, image: TiledImage, count: int) -> None:
        self.image = image
        self.signatures = image.identity.signatures(count)
        self._count = count
        self._encoded: HasRows | None = None

    @property
    def rows(self) -> NDArray[np.floating]:
        """Float `(rows, hidden)`, from `encoded`."""
        assert self._encoded is not None
        assert self._encoded.rows is not None
        return self._encoded.rows

    def encoded(self, encoding: HasRows) -> None:
        """Take what has the rows, and hold it for as long as they are needed."""
        self._encoded = encoding

    def __len__(self) -> int:
        return self._count
