"""Values kept for later, bounded in bytes; some are found by what they begin with."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What keeping one value takes besides it: the item, its key, its places in dictionary and order.
ITEM_BYTES = 700
#: Steps on the way to prompts that are beginnings of another one; what is missed ages like others.
_STEPS = 8


@dataclass(frozen=True)
class Item:
    """Something on the shelf.

    Attributes:
        value: what is kept.
        nbytes: all it takes, this item included.
        prompt: bytes by which it is found from others that begin alike; None: by its key only.
    """

    value: Any
    nbytes: int
    prompt: bytes | None


class Shelf:
    """Keeps values up to a number of bytes, least recently used first to go. Thread-safe.

    Prompts are held in order: of all, the one that begins most like another stands beside it, so
    that finding it takes a number of comparisons that grows with the logarithm of how many there
    are. Keys are strings, because their comparison cannot be interrupted: a Ctrl-C within a key's
    own `__eq__` would leave the dictionary broken.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: OrderedDict[str, Item] = OrderedDict()
        self._order: list[tuple[bytes, str]] = []
        self._held: int | None = 0  # None while something changes, and after it was interrupted
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What is held, as it was told."""
        with self._lock:
            return sum(item.nbytes for item in self._items.values())

    def get(self, key: str) -> Any | None:
        """The value, which now is the most recently used, or None."""
        with self._lock:
            if (item := self._items.get(key)) is None:
                return None
            self._items.move_to_end(key)
            return item.value

    def put(self, key: str, value: Any, nbytes: int, prompt: bytes | None = None) -> None:
        """Keep a value as the most recently used, unless it alone is over the limit.

        Args:
            key: replaces what has it.
            value: what to keep.
            nbytes: of the value; what keeping it takes is added.
            prompt: see `nearest`.
        """
        item = Item(value, nbytes + ITEM_BYTES + len(prompt or b""), prompt)
        with self._lock:
            held = self._change() - self._take(key)
            if item.nbytes <= self.limit:
                self._items[key] = item
                held += item.nbytes
                if prompt is not None:
                    insort(self._order, (prompt, key))
            while held > self.limit:
                held -= self._take(next(iter(self._items)))
            self._held = held

    def drop(self, key: str) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            self._held = self._change() - self._take(key)

    def values(self) -> list[tuple[str, Any]]:
        """What is held, the most recently used first."""
        with self._lock:
            return [(key, item.value) for key, item in reversed(self._items.items())]

    def nearest(self, prompt: bytes) -> list[tuple[str, Any]]:
        """Keys and values of two prompts on either side of `prompt`, in order: of all others, one
        of each two has the longest beginning in common with it, even where one is the asker's."""
        with self._lock:
            held = self._change()
            place = bisect_left(self._order, (prompt,))
            found = self._order[max(place - 2, 0) : place + 2]
            self._held = held
            return [(key, self._items[key].value) for _, key in found]

    def beginnings(self, prompt: bytes) -> list[str]:
        """Keys of prompts that are beginnings of `prompt`, or it itself."""
        with self._lock:
            held, found, sought = self._change(), [], prompt
            place = bisect_left(self._order, (prompt, "\U0010ffff"))
            for _ in range(_STEPS):
                if not place:
                    break
                before, key = self._order[place - 1]
                shared = common_bytes(before, sought)
                if shared == len(before):
                    found.append(key)
                    place -= 1
                else:  # what begins `prompt` and stands before this one is no longer than that
                    sought = sought[:shared]
                    place = bisect_left(self._order, (sought, "\U0010ffff"))
            self._held = held
            return found

    def _change(self) -> int:
        """What is held, known again once it has been told: a change may be interrupted anywhere,
        and then all is counted and put in order from the items, which are right at any moment."""
        held, self._held = self._held, None
        if held is None:
            found = ((item.prompt, key) for key, item in self._items.items())
            self._order = sorted((prompt, key) for prompt, key in found if prompt is not None)
            held = sum(item.nbytes for item in self._items.values())
        return held

    def _take(self, key: str) -> int:
        """Remove an item, if it is there; the bytes that are free now."""
        item = self._items.pop(key, None)
        if item is None:
            return 0
        if item.prompt is not None:
            del self._order[bisect_left(self._order, (item.prompt, key))]
        return item.nbytes


def common_bytes(a: bytes, b: bytes) -> int:
    """Length of the beginning that two byte strings have in common."""
    length = min(len(a), len(b))
    differs = np.frombuffer(a, np.uint8, length) != np.frombuffer(b, np.uint8, length)
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
