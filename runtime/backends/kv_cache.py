"""What a KV cache holds: which positions are filled, with what, and under which rotary base.

The arrays themselves belong to the backend; they are allocated once and written in place.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A mapped block as NumPy and ONNX Runtime hold it, and a cache without its blocks: Python objects
#: and ONNX Runtime's, as measured (tests/runtime/test_held_memory.py holds the sum to RSS).
BUFFER_BYTES, CACHE_BYTES = 1500, 3000


def lazy_zeros(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros whose pages are committed one by one as they are written.

    NumPy asks for huge pages, and keys and values of one head lie apart: the first token of the 26B
    in a long context would commit 2 MiB for each of 768 heads, 1.3 GB instead of 9 MB.
    """
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    if not size or not hasattr(mmap, "MAP_PRIVATE"):
        return np.zeros(shape, dtype)
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    return np.frombuffer(block, dtype, count).reshape(shape)


def committed_bytes(array: NDArray[Any], positions: int) -> int:
    """Memory that the first positions of each head take in `lazy_zeros`, in whole pages.

    Args:
        array: `(1, kv_heads, capacity, head_dim)`.
        positions: how many were ever written.
    """
    _, heads, capacity, width = array.shape
    row = width * array.itemsize
    starts = np.arange(heads) * capacity * row
    first = starts // mmap.PAGESIZE
    last = (starts + positions * row - 1) // mmap.PAGESIZE
    if not positions:
        return 0
    shared = np.count_nonzero(first[1:] <= last[:-1])  # pages in which two heads meet
    return int((last - first + 1).sum() - shared) * mmap.PAGESIZE


class CacheState:
    """Bookkeeping of one cache of `capacity` positions.

    Each filled position has a signature: the token id, or for an image row a negative number that
    names the image and the row (`ImageIdentity`). Two sequences share cached rows exactly as far
    as their signatures agree, also where that is within an image.

    Attributes:
        length: filled positions.
        touched: positions that were ever written: their memory is taken.
        owner: refers to who goes on with it after an answer, if anybody does.
        lock: held by whoever writes rows or copies them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._signatures = np.empty(0, np.int64)
        self._base: float | None = None
        self.length = 0
        self.touched = 0
        self.owner: weakref.ref[Any] | None = None
        self.lock = threading.RLock()

    def common_prefix(self, signatures: NDArray[np.int64], base: float) -> int:
        """Leading positions of `signatures (tokens,)` that are cached under rotary `base`."""
        if base != self._base:
            return 0
        shared = min(self.length, len(signatures))
        differs = np.flatnonzero(self._signatures[:shared] != signatures[:shared])
        return int(differs[0]) if len(differs) else shared

    def content(self) -> tuple[NDArray[np.int64], float | None]:
        """Signatures `(length,)` and the rotary base that all of them are under; None: several."""
        return self._signatures[: self.length], self._base

    @property
    def in_use(self) -> bool:
        """Whether somebody goes on with it after an answer."""
        return self.owner is not None and self.owner() is not None

    @property
    def nbytes(self) -> int:
        """Memory of the bookkeeping."""
        return self._signatures.nbytes

    def reserve(self, count: int) -> None:
        """Note that the next `count` positions are about to be written."""
        self.touched = max(self.touched, self.length + count)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; their memory is overwritten later."""
        self.length = min(self.length, length)

    def extend(self, signatures: NDArray[np.int64], base: float) -> None:
        """Record rows just written behind the filled ones."""
        stop = self.length + len(signatures)
        self.touched = max(self.touched, stop)
        if stop > len(self._signatures):
            self._signatures = self._larger(stop)
        self._signatures[self.length : stop] = signatures
        if self.length == 0:
            self._base = base
        elif base != self._base:
            self._base = None  # mixed bases: good for going on, not for sharing
        self.length = stop

    def _larger(self, needed: int) -> NDArray[np.int64]:
        """A copy with room for `needed` and an eighth more, so that tokens come one by one."""
        grown = np.empty(min(needed + needed // 8 + 32, max(self.capacity, needed)), np.int64)
        grown[: self.length] = self._signatures[: self.length]
        return grown


def held_bytes(buffers: Sequence[NDArray[Any]], state: CacheState) -> int:
    """All the memory that a cache takes between passes.

    Args:
        buffers: of `lazy_zeros`, all alike.
        state: of the cache.
    """
    each = committed_bytes(buffers[0], state.touched) + BUFFER_BYTES
    return len(buffers) * each + state.nbytes + CACHE_BYTES


def filled_bytes(arrays: Sequence[NDArray[Any]], state: CacheState) -> int:
    """Bytes of the filled positions of arrays `(1, kv_heads, capacity, head_dim)`."""
    return sum(array.nbytes // state.capacity * state.length for array in arrays)


def copy_positions(target: NDArray[Any], source: NDArray[Any], start: int, stop: int) -> None:
    """Positions `start..stop` between arrays `(1, kv_heads, capacity, head_dim)`."""
    target[:, :, start:stop] = source[:, :, start:stop]
