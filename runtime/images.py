"""Images on their way into a prompt: cut into tiles, named by content, encoded when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.errors import ImageError

#: Makes the tiles of an image, and the 32 bytes that name its content.
Tiling = Callable[[], tuple[Any, bytes]]


class TiledImage:
    """An image cut into tiles, with the identity its rows have in the KV cache.

    Attributes:
        tiles: how many there are.
        key: names image and tiling.
        signature: of its rows; see `CacheState`.
    """

    def __init__(self, cut: Tiling) -> None:
        self._cut = cut
        self._held, self._content = cut()
        self.tiles = len(self._held)
        self.key = self._content + self.tiles.to_bytes(2, "little")
        # Token ids are not negative, so a negative number can never be one.
        self.signature = -1 - int.from_bytes(self._content[:7], "little")

    def pixels(self) -> Any:
        """uint8 `(tiles, S, S, 3)` where the tiler made them, cut anew after `release`.

        Raises:
            ImageError: what was released cannot be read again, or is another image now.
        """
        if self._held is None:
            held, content = self._cut()
            if content != self._content:
                raise ImageError("an image shown earlier has changed since; show it again")
            self._held = held
        return self._held

    def release(self) -> None:
        """Forget the tiles: a conversation keeps what it was shown as it was given."""
        self._held = None


@dataclass(frozen=True)
class LazyImage:
    """An image of a prompt whose rows are made when the engine asks; see `PromptImage`."""

    signature: int
    count: int
    load: Callable[[], NDArray[np.floating]]

    @property
    def rows(self) -> NDArray[np.floating]:
        return self.load()

    def __len__(self) -> int:
        return self.count
