"""What outlives an answer: rows of images, and KV caches that other prompts may begin with.

Both lie on one shelf that is bounded in bytes; what was used longest ago goes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.image_folder import ImageFolder
from internvl_edge.runtime.images import ImageIdentity

Rows = NDArray[np.floating]

#: Shared positions below which nothing is copied: the template alone is not worth it.
LEAST_SHARED = 16


@dataclass(frozen=True)
class Item:
    """Something on the shelf, and how many bytes it holds."""

    value: Any
    nbytes: int


@dataclass(frozen=True)
class CacheKey:
    """Names a KV cache on the shelf."""

    identity: int


class Shelf:
    """Keeps values up to a number of bytes, least recently used first to go. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: OrderedDict[Hashable, Item] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(item.nbytes for item in self._items.values())

    def get(self, key: Hashable) -> Any | None:
        """The value, which now is the most recently used, or None."""
        with self._lock:
            if (item := self._items.get(key)) is None:
                return None
            self._items.move_to_end(key)
            return item.value

    def put(self, key: Hashable, value: Any, nbytes: int) -> None:
        """Keep a value as the most recently used, unless it alone is over the limit."""
        with self._lock:
            self._items.pop(key, None)
            if nbytes > self.limit:
                return
            self._items[key] = Item(value, nbytes)
            held = sum(item.nbytes for item in self._items.values())
            while held > self.limit:
                _, oldest = self._items.popitem(last=False)
                held -= oldest.nbytes

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._items.pop(key, None)

    def values(self) -> list[tuple[Hashable, Any]]:
        """What is held, the most recently used first."""
        with self._lock:
            return [(key, item.value) for key, item in reversed(self._items.items())]


class ImageStore:
    """Rows of encoded images by the identity of the image.

    Args:
        shelf: memory.
        folder: where rows are kept beyond the process, too; None keeps none.
    """

    def __init__(self, shelf: Shelf, folder: ImageFolder | None = None) -> None:
        self._shelf = shelf
        self._folder = folder

    def rows(self, image: ImageIdentity, encode: Callable[[], Rows]) -> Rows:
        """Rows `(tiles * tokens_per_tile, hidden)` of an image, encoded only where not known."""
        if (held := self._shelf.get(image.digest)) is not None:
            return np.asarray(held)
        rows = self._folder.load(image) if self._folder else None
        if rows is None:
            rows = encode()
            if self._folder:
                self._folder.save(image, rows)
        rows.flags.writeable = False
        self._shelf.put(image.digest, rows, rows.nbytes)
        return rows


class PrefixStore:
    """KV caches of earlier answers, for prompts that begin as theirs did.

    A cache stays its owner's, who may go on writing to it: its lock is held while rows are copied.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def keep(self, cache: Cache) -> None:
        """Offer what a cache holds to later prompts, instead of caches that hold less of it."""
        for key, value in self._shelf.values():
            if isinstance(key, CacheKey) and cache.state.covers(value.state):
                self._shelf.drop(key)
        self._shelf.put(CacheKey(id(cache)), cache, cache.nbytes)

    def fill(self, cache: Cache, signatures: NDArray[np.int64], base: float) -> int:
        """Copy into `cache` the longest prefix any kept cache has, if it beats its own.

        Args:
            cache: to be brought to `signatures (tokens,)` under rotary `base`.

        Returns:
            How many leading positions it now shares.
        """
        own = cache.state.common_prefix(signatures, base)
        shared = own + LEAST_SHARED
        donor: Cache | None = None
        for key, value in self._shelf.values():
            if isinstance(key, CacheKey) and value is not cache:
                length = value.state.common_prefix(signatures, base)
                if length > shared:
                    shared, donor = length, value
        if donor is None:
            return own
        first, second = sorted((cache, donor), key=id)  # one order everywhere: no deadlock
        with first.state.lock, second.state.lock:
            shared = donor.state.common_prefix(signatures, base)  # it may have moved on
            if shared <= own:
                return own
            cache.state.truncate(own)
            cache.copy_rows(donor, own, shared)
            cache.state.extend(signatures[own:shared], base)
        self._shelf.get(CacheKey(id(donor)))
        return shared
