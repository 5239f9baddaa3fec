"""What outlives an answer: rows of images, and KV caches that other prompts may begin with.

Both lie on one shelf that is bounded in bytes; what was used longest ago goes first.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.files import open_regular

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
    """Rows of encoded images by the hash of their content.

    Args:
        shelf: memory.
        folder: where rows are kept beyond the process, too; None keeps none.
    """

    def __init__(self, shelf: Shelf, folder: ImageFolder | None = None) -> None:
        self._shelf = shelf
        self._folder = folder

    def rows(self, key: bytes, encode: Callable[[], Rows]) -> Rows:
        """Rows `(tiles * tokens_per_tile, hidden)` of an image, encoded only where not known."""
        if (held := self._shelf.get(key)) is not None:
            return np.asarray(held)
        rows = self._folder.load(key) if self._folder else None
        if rows is None:
            rows = encode()
            if self._folder:
                self._folder.save(key, rows)
        rows.flags.writeable = False
        self._shelf.put(key, rows, rows.nbytes)
        return rows


class ImageFolder:
    """Rows on disk, one file an image: a NumPy array followed by its sha256.

    Args:
        path: created when missing.
        model: what the rows depend on besides the image: part of the files' names.
    """

    def __init__(self, path: Path, model: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._model = model

    def load(self, key: bytes) -> Rows | None:
        """Rows saved before; None where there are none or the file is damaged."""
        try:
            with open_regular(self._file(key)) as file:
                data = file.read()
        except OSError:
            return None
        body, digest = data[:-32], data[-32:]
        if hashlib.sha256(body).digest() != digest:
            return None
        return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))

    def save(self, key: bytes, rows: Rows) -> None:
        """Write beside the target and rename, so that a reader never meets half a file."""
        stream = io.BytesIO()
        np.save(stream, rows)
        body = stream.getvalue()
        handle, aside = tempfile.mkstemp(dir=self._path, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body + hashlib.sha256(body).digest())
            os.replace(aside, self._file(key))
        except OSError:  # a full disk only costs the next process some work
            Path(aside).unlink(missing_ok=True)

    def _file(self, key: bytes) -> Path:
        return self._path / f"{self._model}-{key.hex()}.rows"


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
