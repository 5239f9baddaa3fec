"""KV caches on a device as slots side by side, so that sequences share a pass uncopied.

A pass takes the caches of neighbouring slots; a sequence joins by its cache's being there. Slots
between those that are run get a row too, which is written where nothing is: behind what they hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.backends.cuda import Box, Cuda
from internvl_edge.runtime.backends.kv_cache import CacheState


class Storage:
    """Keys and values of some caches.

    Args:
        context: positions of each.
        slots: how many caches there is room for.

    Attributes:
        memory: `(2 * layers, slots, kv_heads, context, head_dim)`: layer by layer, keys first.
        free: slots that no cache has.
        ends: of each slot, behind which position nothing is held.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, context: int, slots: int) -> None:
        language = bundle.spec.language
        # Cleared: a masked key has the weight zero, and zero times NaN stays NaN.
        self.memory = cuda.zeros(
            (2 * language.num_hidden_layers, *contract.cache_shape(language, context, slots)),
            contract.CACHE_DTYPE[bundle.manifest.kv],
        )
        self.free = set(range(slots))
        self.ends = [0] * slots

    @property
    def slots(self) -> int:
        return int(self.memory.shape[1])

    @property
    def context(self) -> int:
        """Positions of a slot."""
        return int(self.memory.shape[3])

    @property
    def idle(self) -> bool:
        """Whether no cache is there."""
        return len(self.free) == self.slots

    @property
    def row_bytes(self) -> int:
        """Of one position of one head."""
        return int(self.memory.shape[-1] * self.memory.dtype.itemsize)

    @property
    def pitch(self) -> int:
        """Bytes from one head's positions to the next's."""
        return self.memory.shape[-2] * self.row_bytes

    @property
    def kv_heads(self) -> int:
        return int(self.memory.shape[2])

    @property
    def planes(self) -> int:
        """Keys and values of all layers."""
        return int(self.memory.shape[0])

    def address(self, plane: int, slot: int) -> int:
        """Where the first position of a slot is."""
        return self.memory.address + (plane * self.slots + slot) * self.kv_heads * self.pitch


S = TypeVar("S", bound=Storage)


@dataclass(eq=False)
class Slot(Generic[S]):
    """A place for one cache in a storage, which is the cache's for as long as it holds it."""

    storage: S
    index: int

    @property
    def end(self) -> int:
        """Behind which position nothing is held."""
        return self.storage.ends[self.index]

    @end.setter
    def end(self, position: int) -> None:
        self.storage.ends[self.index] = position

    def box(self, position: int) -> Box:
        """Its positions from one on, of each head of each layer."""
        storage = self.storage
        start = storage.address(0, self.index) + position * storage.row_bytes
        return Box(start, storage.pitch, storage.slots * storage.kv_heads)

    def copy(self, cuda: Cuda, source: Box, start: int, stop: int) -> None:
        """Queue a copy of positions `start..stop` from a box that begins with them."""
        storage, width = self.storage, (stop - start) * self.storage.row_bytes
        cuda.copy_box(source, self.box(start), (width, storage.kv_heads, storage.planes))

    def clear(self, cuda: Cuda) -> None:
        """Queue zeros."""
        memory = self.storage.memory
        flat = memory.of_shape((self.storage.planes * self.storage.slots, *memory.shape[2:]))
        for plane in range(self.storage.planes):
            place = plane * self.storage.slots + self.index
            cuda.clear(flat[place : place + 1])


class Storages(Generic[S]):
    """All storages of a model: the first has room for as many caches as share a pass, others for
    one.

    One that no cache is in stays while no other has room.

    Args:
        allocate: makes a storage of so many slots.
        sequences: that share a pass.
    """

    def __init__(self, allocate: Callable[[int], S], sequences: int) -> None:
        self._allocate, self._sequences = allocate, sequences
        self._all: list[S] = []

    def reserve(self) -> None:
        """Take the memory of the first storage now."""
        if not self._all:
            self._all.append(self._allocate(self._sequences))

    def take(self) -> Slot[S]:
        """Return a free slot, of new memory where there is none; it is given back when it goes."""
        for storage in self._all[:]:
            if storage.free:
                return self._slot(storage)
        made = self._allocate(1 if self._all else self._sequences)
        slot = self._slot(made)
        self._all.append(made)  # last: one that is idle may be let go of at any moment
        return slot

    def is_in_way(self, cache: Cache) -> bool:
        """See `SlottedBackend.is_in_way`."""
        assert isinstance(cache, SlotCache)
        shared = self._all[0]  # the only one with room for several
        return shared.slots > 1 and not shared.free and cache.slot.storage is shared

    def _slot(self, storage: S) -> Slot[S]:
        """Take the lowest free slot: a pass runs all up to the highest that is taken.

        It is taken when it is sure to be given back, so that an interrupt loses none.
        """
        slot = Slot(storage, min(storage.free))
        weakref.finalize(slot, self._give_back, storage, slot.index).atexit = False
        storage.free.discard(slot.index)
        return slot

    def _give_back(self, storage: S, index: int) -> None:
        """Keep a slot for the next cache, or free its memory; in the midst of anything."""
        storage.ends[index] = 0
        storage.free.add(index)
        for one in reversed(self._all[:]):
            if one.idle and any(other.free for other in self._all if other is not one):
                with suppress(ValueError):  # another slot was given back meanwhile
                    self._all.remove(one)


class SlotCache(Generic[S]):
    """A KV cache as large as a slot; `capacity` positions of it are used.

    Args:
        slot: where it is.
        capacity: see `CacheState`.
    """

    def __init__(self, cuda: Cuda, slot: Slot[S], capacity: int) -> None:
        self.state, self.slot, self._cuda = CacheState(capacity), slot, cuda

    @property
    def nbytes(self) -> int:
        # Taken whole when it was allocated.
        return self.slot.storage.memory.nbytes // self.slot.storage.slots

    def trim(self) -> None:
        """Nothing: all of it was taken when the cache was made."""

    def clear(self) -> None:
        """Queue zeros; see `Cache`."""
        with self._cuda.active():
            self.slot.clear(self._cuda)

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        """Queue one copy: a run of positions in each head of each layer."""
        assert isinstance(source, SlotCache)
        with self._cuda.active():
            self.slot.copy(self._cuda, source.slot.box(start), start, stop)
            self.slot.end = max(self.slot.end, stop)


def together(slots: Sequence[Slot[S]]) -> Iterator[list[int]]:
    """Group slots whose next positions can be run in one pass: of one storage, and without one
    between them whose positions are all taken, which has no place for a row.

    Yields:
        places in `slots`, in the order in which they lie.
    """
    group: list[int] = []
    for index in sorted(range(len(slots)), key=lambda i: _place(slots[i])):
        slot = slots[index]
        if group:
            last = slots[group[-1]]
            between = last.storage.ends[last.index + 1 : slot.index]
            full = any(end >= slot.storage.context for end in between)
            if slot.storage is not last.storage or full:
                yield group
                group = []
        group.append(index)
    if group:
        yield group


def _place(slot: Slot[S]) -> tuple[int, int]:
    return id(slot.storage), slot.index
