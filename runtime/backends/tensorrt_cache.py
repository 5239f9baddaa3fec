"""KV caches of TensorRT engines: slots, their rotary tables, and the steps over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.backends.slots import Slot, SlotCache, Storage, Storages


@dataclass(frozen=True)
class Span:
    """Neighbouring slots that share a pass, and how many keys it reads."""

    first: int
    count: int
    keys: int


class EngineStorage(Storage):
    """Keys, values and rotary tables of some caches, and the steps over them.

    Args:
        context: positions of each.
        slots: how many caches there is room for.
        dtype: of the rotary tables.

    Attributes:
        tables: cos and sin `(slots, context, head_dim / 2)`.
        steps: captured ones.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, context: int, slots: int, dtype: str) -> None:
        super().__init__(bundle, cuda, context, slots)
        table = (slots, context, bundle.spec.language.head_dim // 2)
        self.tables = (cuda.zeros(table, dtype), cuda.zeros(table, dtype))
        self.steps: dict[Span, Callable[[], None]] = {}

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


EngineSlot: TypeAlias = Slot[EngineStorage]


class TensorRtCache(SlotCache[EngineStorage]):
    """A KV cache as large as the engine's context, with its rotary tables; see `SlotCache`.

    Args:
        storages: where its slot is of, and goes back to.
        language: of the model.
    """

    def __init__(
        self, cuda: Cuda, storages: Storages[EngineStorage], language: LanguageSpec, capacity: int
    ) -> None:
        super().__init__(cuda, storages.take(), capacity)
        table = self.slot.storage.tables[0]
        self._rope = RopeTable(language, table.shape[1], str(table.dtype))

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes, on the device and on the host."""
        tables = sum(table.nbytes for table in self.slot.storage.tables)
        own = tables // self.slot.storage.slots + 2 * self._rope.cos.nbytes
        return self.nbytes + own + self.state.nbytes

    def prepare(self, start: int, total: int, base: float) -> None:
        """Queue the rotary rows that changed."""
        self._rope.prepare(start, total, base, self._upload)

    def _upload(self, rows: slice) -> None:
        index, hosts = self.slot.index, (self._rope.cos, self._rope.sin)
        for table, host in zip(self.slot.storage.tables, hosts, strict=True):
            own = table[index : index + 1].of_shape(table.shape[1:])
            self._cuda.upload(host[rows], own[rows])
