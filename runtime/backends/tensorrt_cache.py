"""KV caches of TensorRT engines: slots side by side, so that sequences share a pass uncopied.

A pass takes the caches of neighbouring slots; a sequence joins by its cache's being there. Slots
between those that are run get a row too, which is written where nothing is: behind what they hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.backends.cuda import Box, Cuda
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.backends.plans import Limits
from internvl_edge.runtime.backends.rope_table import RopeTable


@dataclass(frozen=True)
class Span:
    """Neighbouring slots that share a pass, and how many keys it reads."""

    first: int
    count: int
    keys: int


class Storage:
    """Keys, values and rotary tables of some caches, and the steps over them.

    Args:
        slots: how many caches there is room for.
        dtype: of the rotary tables.

    Attributes:
        memory: `(2 * layers, slots, kv_heads, context, head_dim)`: layer by layer, keys first.
        tables: cos and sin `(slots, context, head_dim / 2)`.
        steps: captured ones.
        free: slots that no cache has.
        ends: of each slot, behind which position nothing is held.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, limits: Limits, slots: int, dtype: str) -> None:
        language = bundle.spec.language
        shape = contract.cache_shape(language, limits.context, slots)
        # Cleared: a masked key has the weight zero, and zero times NaN stays NaN.
        self.memory = cuda.zeros(
            (2 * language.num_hidden_layers, *shape), contract.CACHE_DTYPE[bundle.manifest.kv]
        )
        table = (slots, limits.context, language.head_dim // 2)
        self.tables = (cuda.zeros(table, dtype), cuda.zeros(table, dtype))
        self.steps: dict[Span, Callable[[], None]] = {}
        self.free = list(range(slots))
        self.ends = [0] * slots

    @property
    def slots(self) -> int:
        return int(self.memory.shape[1])

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

    def take(self) -> Slot:
        """Give the lowest free slot to a cache: a pass takes all up to the highest that is run."""
        index = min(self.free)
        self.free.remove(index)
        return Slot(self, index)

    def address(self, plane: int, slot: int) -> int:
        """Where the first position of a slot is."""
        return self.memory.address + (plane * self.slots + slot) * self.kv_heads * self.pitch

    def addresses(self, first: int, fresh: DeviceArray | None, rows: int) -> dict[str, int]:
        """Return addresses by tensor name, of slots from the first one on.

        Past and present are one place, or the present of so many rows comes out at `fresh`.
        """
        found = {
            name: table[first : first + 1].address
            for name, table in zip((contract.ROPE_COS, contract.ROPE_SIN), self.tables, strict=True)
        }
        for plane in range(self.planes):
            layer, part = divmod(plane, 2)
            past = (contract.past_key, contract.past_value)[part](layer)
            present = (contract.present_key, contract.present_value)[part](layer)
            found[past] = found[present] = self.address(plane, first)
            if fresh is not None:  # packed, so that one copy takes all of a sequence
                found[present] = fresh.address + plane * self.kv_heads * rows * self.row_bytes
        return found


@dataclass(eq=False)
class Slot:
    """A place for one cache in a storage."""

    storage: Storage
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


class Storages:
    """All storages of an engine: the first has room for as many caches as share a pass, others for
    one.

    One that no cache is in stays while no other has room.

    Args:
        allocate: makes a storage of so many slots.
        sequences: that share a pass.
    """

    def __init__(self, allocate: Callable[[int], Storage], sequences: int) -> None:
        self._allocate, self._sequences = allocate, sequences
        self._all: list[Storage] = []

    def take(self) -> Slot:
        """Return a free slot, of new memory where there is none."""
        for storage in self._all:
            if storage.free:
                return storage.take()
        self._all.append(self._allocate(1 if self._all else self._sequences))
        return self._all[-1].take()

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for the next cache, or free its memory."""
        slot.end = 0
        slot.storage.free.append(slot.index)
        for storage in reversed(self._all[:]):
            if storage.idle and any(other.free for other in self._all if other is not storage):
                self._all.remove(storage)


class TensorRtCache:
    """A KV cache as large as the engine's context; `capacity` positions of it are used.

    Args:
        storages: where its slot is of, and goes back to.
        language: of the model.
        capacity: see `CacheState`.
    """

    def __init__(
        self, cuda: Cuda, storages: Storages, language: LanguageSpec, capacity: int
    ) -> None:
        self.state, self.slot, self._cuda = CacheState(capacity), storages.take(), cuda
        weakref.finalize(self, storages.give_back, self.slot).atexit = False
        table = self.slot.storage.tables[0]
        self._rope = RopeTable(language, table.shape[1], str(table.dtype))

    @property
    def nbytes(self) -> int:
        # Taken whole when it was allocated.
        return self.slot.storage.memory.nbytes // self.slot.storage.slots

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes, on the device and on the host."""
        tables = sum(table.nbytes for table in self.slot.storage.tables)
        own = tables // self.slot.storage.slots + 2 * self._rope.cos.nbytes
        return self.nbytes + own + self.state.nbytes

    def trim(self) -> None:
        """Nothing: all of it was taken when the cache was made."""

    def clear(self) -> None:
        """Queue zeros; see `Cache`."""
        with self._cuda.active():
            self.slot.clear(self._cuda)

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        """Queue one copy: a run of positions in each head of each layer."""
        assert isinstance(source, TensorRtCache)
        with self._cuda.active():
            self.slot.copy(self._cuda, source.slot.box(start), start, stop)
            self.slot.end = max(self.slot.end, stop)

    def prepare(self, start: int, total: int, base: float) -> None:
        """Queue the rotary rows that changed."""
        self._rope.prepare(start, total, base, self._upload)

    def _upload(self, rows: slice) -> None:
        index, hosts = self.slot.index, (self._rope.cos, self._rope.sin)
        for table, host in zip(self.slot.storage.tables, hosts, strict=True):
            own = table[index : index + 1].of_shape(table.shape[1:])
            self._cuda.upload(host[rows], own[rows])


def together(caches: Sequence[TensorRtCache], context: int) -> Iterator[list[int]]:
    """Group caches whose next positions can be run in one pass: of one storage, and without one
    between them whose positions are all taken, which has no place for a row.

    Args:
        context: positions of a slot.

    Yields:
        places in `caches`, in the order of their slots.
    """
    group: list[int] = []
    order = sorted(range(len(caches)), key=lambda i: _place(caches[i]))
    for index in order:
        slot = caches[index].slot
        if group:
            last = caches[group[-1]].slot
            between = last.storage.ends[last.index + 1 : slot.index]
            if slot.storage is not last.storage or any(end >= context for end in between):
                yield group
                group = []
        group.append(index)
    if group:
        yield group


def _place(cache: TensorRtCache) -> tuple[int, int]:
    return id(cache.slot.storage), cache.slot.index
