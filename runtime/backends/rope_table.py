"""Rotary tables that keep their address, filled as far as they are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.rope import rope_rows
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.runtime.backends.kv_cache import lazy_zeros

#: Rows filled at a time, so that decoding does not call into trigonometry every step.
_BLOCK = 256


class RopeTable:
    """cos and sin `(capacity, head_dim / 2)`, filled as far as needed and rebuilt per base.

    The two arrays keep their address, so a backend may bind them once.
    """

    def __init__(self, spec: LanguageSpec, capacity: int, dtype: str) -> None:
        shape = (capacity, spec.head_dim // 2)
        self.cos = lazy_zeros(shape, dtype)
        self.sin = lazy_zeros(shape, dtype)
        self._spec = spec
        self._base: float | None = spec.rope_theta
        self._filled = 0

    def prepare(
        self,
        start: int,
        total_length: int,
        base: float,
        copy: Callable[[slice], None] = lambda rows: None,
    ) -> None:
        """Make rows start..total_length-1 right for `base`.

        Args:
            copy: takes the rows that were written to where else they are wanted. They are known as
                right only after that: an interrupt on the way leaves them to be written again.
        """
        if base != self._base:
            self._base = None
            # Only the rows of this pass are read: cached keys were rotated when they were written.
            self._fill(slice(start, total_length), base, copy)
            self._filled, self._base = 0, base
        elif total_length > self._filled:
            stop = min(max(total_length, self._filled + _BLOCK), len(self.cos))
            self._fill(slice(self._filled, stop), base, copy)
            self._filled = stop

    def _fill(self, rows: slice, base: float, copy: Callable[[slice], None]) -> None:
        self.cos[rows], self.sin[rows] = rope_rows(self._spec, base, rows.start, rows.stop)
        copy(rows)


class CacheRope:
    """The rotary tables of one cache: those that all caches share while the trained base is
    enough, and beyond it its own.

    Args:
        shared: of the trained base, never asked for another.
        spec: of the model.
        capacity: of the cache: rows of its tables.
    """

    def __init__(self, shared: RopeTable, spec: LanguageSpec, capacity: int) -> None:
        self._shared, self._spec, self._capacity = shared, spec, capacity
        self._own: RopeTable | None = None

    def tables(
        self, start: int, total_length: int, base: float
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """cos and sin `(capacity, head_dim / 2)`, rows start..total_length-1 right for `base`."""
        table = self._table(base)
        table.prepare(start, total_length, base)
        return table.cos[: self._capacity], table.sin[: self._capacity]

    def release(self) -> None:
        """Give back the cache's own tables until they are needed again."""
        self._own = None

    def _table(self, base: float) -> RopeTable:
        if base == self._spec.rope_theta and self._capacity <= len(self._shared.cos):
            return self._shared
        if self._own is None:
            self._own = RopeTable(self._spec, self._capacity, str(self._shared.cos.dtype))
        return self._own
