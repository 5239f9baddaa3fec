"""What outlives an answer: rows of images, and KV caches that other prompts may begin with.

Both lie on one shelf that is bounded in bytes; what was used longest ago goes first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.shelf import Shelf
from internvl_edge.runtime.images.folder import ImageFolder
from internvl_edge.runtime.images.identity import ImageIdentity

Rows = NDArray[np.floating]

#: Shared positions below which nothing is copied: the template alone is not worth it.
LEAST_SHARED = 16
#: What keys of caches begin with.
_CACHE = "cache "


class ImageStore:
    """Rows of encoded images by the identity of the image.

    Args:
        shelf: memory.
        folder: where rows are kept beyond the process, too; None keeps none.
    """

    def __init__(self, shelf: Shelf, folder: ImageFolder | None = None) -> None:
        self._shelf = shelf
        self._folder = folder

    def get(self, image: ImageIdentity) -> Rows | None:
        """Rows `(tiles * tokens_per_tile, hidden)` of an image; None where they are not known."""
        if (held := self._shelf.get(_rows_key(image))) is not None:
            return np.asarray(held)
        rows = self._folder.load(image) if self._folder else None
        return None if rows is None else self._keep(image, rows)

    def put(self, image: ImageIdentity, rows: Rows) -> Rows:
        """Keep the rows of an image, which are not to be written to any more; return them."""
        if self._folder:
            self._folder.save(image, rows)
        return self._keep(image, rows)

    def _keep(self, image: ImageIdentity, rows: Rows) -> Rows:
        rows.flags.writeable = False
        self._shelf.put(_rows_key(image), rows, rows.nbytes)
        return rows


class PrefixStore:
    """KV caches of earlier answers, for prompts that begin as theirs did.

    A cache stays its owner's, who may go on writing to it: its lock is held while rows are copied.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def keep(self, cache: Cache) -> None:
        """Offer what a cache holds to later prompts, instead of caches that hold less of it."""
        with cache.state.lock:
            signatures, base = cache.state.content()
            cache.trim()
            nbytes = cache.held_bytes
        if base is None or not len(signatures):
            self._shelf.drop(_key(cache))
            return
        prompt = _prompt(signatures, base)
        for key in self._shelf.beginnings(prompt):
            self._shelf.drop(key)
        self._shelf.put(_key(cache), cache, nbytes, prompt)

    def make_room(self, is_in_way: Callable[[Cache], bool]) -> None:
        """Forget the least recently used of the caches in the way that nobody goes on with."""
        oldest_first = reversed(self._shelf.values())
        kept = ((key, one) for key, one in oldest_first if key.startswith(_CACHE))
        key = next((key for key, one in kept if not one.state.in_use and is_in_way(one)), None)
        if key is not None:
            del oldest_first, kept  # its memory goes with the last that refers to it
            self._shelf.drop(key)

    def fill(
        self,
        cache: Cache,
        signatures: NDArray[np.int64],
        base: float,
        beside: Sequence[Cache] = (),
    ) -> int:
        """Copy into `cache` the longest prefix any kept cache has, if it beats its own.

        Args:
            cache: to be brought to `signatures (tokens,)` under rotary `base`.
            beside: caches that are not kept, and may be copied from, too.

        Returns:
            How many leading positions it now shares.
        """
        own = cache.state.common_prefix(signatures, base)
        shared = own + LEAST_SHARED
        donor: Cache | None = None
        kept = [value for _, value in self._shelf.nearest(_prompt(signatures, base))]
        for value in [*kept, *beside]:
            if value is not cache:
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
            cache.state.reserve(shared - own)
            cache.copy_rows(donor, own, shared)
            cache.state.extend(signatures[own:shared], base)
        self._shelf.get(_key(donor))
        return shared


def _rows_key(image: ImageIdentity) -> str:
    return f"rows {image.digest.hex()}"


def _key(cache: Cache) -> str:
    return f"{_CACHE}{id(cache)}"


def _prompt(signatures: NDArray[np.int64], base: float) -> bytes:
    """What cached rows depend on, so that equal beginnings are equal rows."""
    return struct.pack("<d", base) + signatures.tobytes()
