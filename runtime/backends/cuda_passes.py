"""What ONNX Runtime on CUDA is given in a pass: bound where it is, in device memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.backends.slots import Slot, SlotCache, Storage


@dataclass(frozen=True)
class Place:
    """A device, and ONNX Runtime's name for its memory."""

    cuda: Cuda
    memory: str


class Binding:
    """Device memory as inputs and outputs of a graph: ONNX Runtime is told what changed.

    Args:
        session: of the graph.

    Attributes:
        io: `onnxruntime.IOBinding`.
    """

    def __init__(self, place: Place, session: Any) -> None:
        self.io: Any = session.io_binding()
        self._place = place
        self._bound: dict[str, tuple[type, tuple[int, ...], int]] = {}

    def input(self, name: str, array: DeviceArray) -> None:
        """Bind an input."""
        self._bind(self.io.bind_input, name, array)

    def output(self, name: str, array: DeviceArray) -> None:
        """Bind an output."""
        self._bind(self.io.bind_output, name, array)

    def _bind(self, bind: Callable[..., None], name: str, array: DeviceArray) -> None:
        told = array.dtype.type, array.shape, array.address
        if self._bound.get(name) != told:
            self._bound.pop(name, None)  # an interrupt leaves it to be bound again
            bind(name, self._place.memory, self._place.cuda.device, *told)
            self._bound[name] = told


class StagedInput:
    """An input that stays where it is: pinned memory, copied to the device."""

    def __init__(self, cuda: Cuda, name: str, dtype: DTypeLike) -> None:
        self._cuda, self._name, self._dtype = cuda, name, np.dtype(dtype)
        self._host: NDArray[Any] = np.empty(0, self._dtype)
        self._device: DeviceArray | None = None

    def write(self, binding: Binding, values: NDArray[Any]) -> None:
        """Queue the copy of `values` and bind it; the last one must have been made. Memory grows
        to the longest pass, and then stays."""
        rows, cuda = len(values), self._cuda
        if self._device is None or rows > len(self._device):
            self._device = None  # until both are larger
            self._host = cuda.pinned(values.shape, self._dtype)
            self._device = cuda.empty(values.shape, self._dtype)
        self._host[:rows] = values
        part = self._device[:rows]
        cuda.upload(self._host[:rows], part)
        binding.input(self._name, part)


class LogitsOutput:
    """The logits of a pass, on the device.

    Args:
        rows: of a step, for which there is memory; that of more goes with their pass.
    """

    def __init__(self, cuda: Cuda, rows: int, vocab: int) -> None:
        self._cuda = cuda
        self._held = cuda.empty((rows, vocab), np.float32)
        self._host = cuda.pinned((rows, vocab), np.float32)
        self.device = self._held

    def bind(self, binding: Binding, rows: int) -> None:
        """Make room for `rows` and bind it."""
        most, vocab = self._held.shape
        within = rows <= most
        self.device = self._held[:rows] if within else self._cuda.empty((rows, vocab), np.float32)
        binding.output(contract.LOGITS, self.device)

    def read(self) -> NDArray[np.float32]:
        """Wait for the bound rows."""
        cuda, rows = self._cuda, len(self.device)
        held = rows <= len(self._held)
        host = self._host[:rows] if held else np.empty(self.device.shape, np.float32)
        cuda.download(self.device, host)
        cuda.synchronize()
        self.device = self._held
        return host.copy() if held else host


class DeviceRope:
    """Rotary tables on the device: cos and sin `(context, head_dim / 2)`.

    Attributes:
        tables: the two.
    """

    def __init__(self, cuda: Cuda, spec: LanguageSpec, context: int, dtype: str) -> None:
        self._cuda, self._host = cuda, RopeTable(spec, context, dtype)
        self.tables = [cuda.zeros(self._host.cos.shape, dtype) for _ in range(2)]

    @property
    def nbytes(self) -> int:
        """Memory it takes, on the device and on the host."""
        return 2 * sum(table.nbytes for table in self.tables)

    def prepare(self, start: int, total: int, base: float) -> None:
        """Queue the rows that are not right for `base`; see `RopeTable.prepare`."""
        self._host.prepare(start, total, base, self._upload)

    def _upload(self, rows: slice) -> None:
        for table, host in zip(self.tables, (self._host.cos, self._host.sin), strict=True):
            self._cuda.upload(host[rows], table[rows])


class CudaStorage(Storage):
    """Keys and values of some caches, the rotary tables they share, and what binds them.

    Args:
        session: of the language graph.
        context: positions of each.
        slots: how many caches there is room for.
    """

    def __init__(
        self, bundle: Bundle, place: Place, session: Any, context: int, slots: int
    ) -> None:
        super().__init__(bundle, place.cuda, context, slots)
        manifest, language = bundle.manifest, bundle.spec.language
        dtype = contract.rope_dtype(manifest.language, manifest.kv, manifest.dialect)
        self._place, self._session, self._language = place, session, language
        # Of several caches some may be beyond the trained length, where bases change step by step.
        self._ropes = [
            DeviceRope(place.cuda, language, context, dtype) for _ in range(min(slots, 2))
        ]
        self._bindings: dict[tuple[int, int], Binding] = {}

    @property
    def held_bytes(self) -> int:
        """All the memory it takes, on the device and on the host."""
        return self.memory.nbytes + sum(rope.nbytes for rope in self._ropes)

    def rope(self, base: float) -> DeviceRope:
        """Return the tables for a base: the trained one, or any other."""
        return self._ropes[0 if base == self._language.rope_theta else -1]

    def binding(self, first: int, count: int) -> Binding:
        """Return a binding of neighbouring slots, as past and as present."""
        if (first, count) not in self._bindings:
            self._bindings[first, count] = self._bound(first, count)
        return self._bindings[first, count]

    def _bound(self, first: int, count: int) -> Binding:
        binding, memory = Binding(self._place, self._session), self.memory
        flat = memory.of_shape((self.planes * self.slots, *memory.shape[2:]))
        for plane, (past, present) in enumerate(contract.cache_pairs(self._language)):
            start = plane * self.slots + first
            part = flat[start : start + count]
            binding.input(past, part)
            binding.output(present, part)
        return binding


CudaSlot: TypeAlias = Slot[CudaStorage]


class CudaCache(SlotCache[CudaStorage]):
    """A KV cache; see `SlotCache`."""

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes, on the device and on the host."""
        return self.slot.storage.held_bytes // self.slot.storage.slots + self.state.nbytes


@dataclass(frozen=True)
class Layout:
    """Where the rows of a pass are of, and stand: one row of each of several sequences, or rows of
    one. A slot between, which is not run, gets a row behind what it holds.

    Attributes:
        first: slot of the pass.
        count: slots.
        places: of those that are run, counted from the first.
        each: rows of a slot.
        start: the first position that is run.
        stop: behind the last one.
        last: int32 `(count,)`, of each slot the position of its last row.
    """

    first: int
    count: int
    places: list[int]
    each: int
    start: int
    stop: int
    last: NDArray[np.int32]

    @classmethod
    def of(cls, parts: Sequence[Slice]) -> Layout:
        """Lay out a pass over neighbouring slots of one storage, in order.

        Args:
            parts: as many rows of each, one where there are several.
        """
        slots = [cache_of(part).slot for part in parts]
        first, each = slots[0].index, len(parts[0].rows)
        count = slots[-1].index + 1 - first
        starts = [part.cache.state.length for part in parts]
        places = [slot.index - first for slot in slots]
        last = np.array(slots[0].storage.ends[first : first + count], np.int32)
        last[places] = np.array(starts) + (each - 1)
        return cls(first, count, places, each, min(starts), max(starts) + each, last)

    @property
    def total(self) -> int:
        """The largest length."""
        return int(self.last.max()) + 1


class PassInputs:
    """The inputs of a pass beside caches."""

    def __init__(self, cuda: Cuda, bundle: Bundle) -> None:
        manifest = bundle.manifest
        dtype = contract.compute_dtype(manifest.language, manifest.dialect)
        self._embeddings = StagedInput(cuda, contract.EMBEDDINGS, dtype)
        self._last = StagedInput(cuda, contract.LAST_POSITION, np.int32)
        self._rows = StagedInput(cuda, contract.LOGIT_ROWS, np.int64)

    def bound(self, parts: Sequence[Slice]) -> tuple[Binding, int]:
        """Queue a pass's inputs.

        Args:
            parts: see `Layout.of`; all under one rotary base.

        Returns:
            what binds them, and how many rows want logits: of each part in turn.
        """
        layout, storage = Layout.of(parts), cache_of(parts[0]).slot.storage
        for part, place in zip(parts, layout.places, strict=True):
            storage.ends[layout.first + place] = part.cache.state.length + layout.each
        binding = storage.binding(layout.first, layout.count)
        rope, base = storage.rope(parts[0].rope_theta), parts[0].rope_theta
        rope.prepare(layout.start, layout.stop, base)
        for name, table in zip((contract.ROPE_COS, contract.ROPE_SIN), rope.tables, strict=True):
            binding.input(name, table)
        self._embeddings.write(binding, _spread([part.rows for part in parts], layout))
        self._last.write(binding, layout.last)
        placed = zip(parts, layout.places, strict=True)
        rows = np.concatenate([part.logit_rows + layout.each * place for part, place in placed])
        self._rows.write(binding, rows)
        # Read on the host, by the attention operator when it is queued.
        binding.io.bind_cpu_input(contract.TOTAL_LENGTH, np.array(layout.total, np.int32))
        return binding, len(rows)


def cache_of(new: Slice) -> CudaCache:
    """Return the cache of a slice."""
    assert isinstance(new.cache, CudaCache)
    return new.cache


def _spread(rows: Sequence[NDArray[np.floating]], layout: Layout) -> NDArray[np.floating]:
    """Return rows `(count * each, hidden)` with those of each part at its place, and zeros."""
    if len(rows) == layout.count:
        return rows[0] if layout.count == 1 else np.concatenate(rows)
    each, hidden = rows[0].shape
    spread = np.zeros((layout.count, each, hidden), rows[0].dtype)
    spread[layout.places] = rows
    return spread.reshape(-1, hidden)
