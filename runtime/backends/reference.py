"""Graphs written for TensorRT on ONNX Runtime's CPU kernels: what an engine should compute.

The operators are standard ones, so the very same files run here, slowly: the oracle that engines
and the other dialect are compared with. It is too kind to float16: ONNX Runtime has few such
kernels on the CPU, multiplies in float32 and drops pairs of casts that meet, so that a value beyond
65,504 may pass. Layers that need float32 are found by calibration, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import BundleError, CapacityError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.runtime.backends import MOST_SLICES, Cache, PlainPasses, Slice, several
from internvl_edge.runtime.backends.graph_contract import takes_batch
from internvl_edge.runtime.backends.kv_cache import (
    CacheState,
    copy_positions,
    filled_bytes,
    held_bytes,
    lazy_zeros,
)
from internvl_edge.runtime.backends.machine import machine_key
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.rope_table import CacheRope, RopeTable
from internvl_edge.runtime.backends.sessions import Provider, open_graphs

#: The cache is read in multiples of this, as an engine's captured graphs do.
KEY_BUCKET = 256


@dataclass(frozen=True)
class Storage:
    """What the graph is given of some sequences' caches.

    Attributes:
        pasts: by input name, OrtValue `(sequences, kv_heads, context, head_dim)`.
        tables: cos and sin `(sequences, context, head_dim / 2)`.
    """

    pasts: dict[str, Any]
    tables: tuple[NDArray[np.floating], ...]


@dataclass
class ReferenceCache:
    """Keys and values by input name, written in place."""

    state: CacheState
    rope: CacheRope
    pasts: dict[str, Any]  # onnxruntime.OrtValue (1, kv_heads, capacity, head_dim)

    @property
    def nbytes(self) -> int:
        """Memory its filled positions take."""
        return filled_bytes([past.numpy() for past in self.pasts.values()], self.state)

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes."""
        return held_bytes([past.numpy() for past in self.pasts.values()], self.state)

    def trim(self) -> None:
        """Give back the cache's own rotary tables."""
        self.rope.release()

    def clear(self) -> None:
        """Zero what was written; see `Cache`."""
        for past in self.pasts.values():
            past.numpy()[:, :, : self.state.touched] = 0

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        """Take positions `start..stop` of another cache; `state` stays."""
        assert isinstance(source, ReferenceCache)
        for name, past in self.pasts.items():
            copy_positions(past.numpy(), source.pasts[name].numpy(), start, stop)


class ReferenceBackend(PlainPasses):
    """Runs a bundle of the tensorrt or tensorrt-portable dialect on the CPU.

    Args:
        bundle: a verified bundle.
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).
        note: why it is this device; part of the description.

    Raises:
        BundleError: a graph does not load (an onnxruntime before 1.25 lacks the newest
            operators), or its inputs are not the contract's.
    """

    def __init__(self, bundle: Bundle, threads: int | None, note: str = "") -> None:
        ort = load_onnxruntime()

        manifest = bundle.manifest
        self._spec = bundle.spec.language
        rope_dtype = contract.rope_dtype(manifest.language, manifest.kv, manifest.dialect)
        self._cache_dtype = contract.CACHE_DTYPE[manifest.kv]
        self._in_place = manifest.traits.cache_in_place
        self._ort_value = ort.OrtValue
        self._rope = RopeTable(self._spec, self._spec.max_context, rope_dtype)
        try:
            self._vision, self._language = open_graphs(bundle, Provider(optimise="basic"), threads)
        except BundleError as error:
            if not manifest.traits.modern:
                raise
            raise BundleError(
                f"{error}; as reference, graphs for TensorRT 10.15 need onnxruntime 1.25 or later"
                f" (Python 3.11 or later), this is {ort.__version__}"
            ) from error
        self._batched = takes_batch(self._language)
        self.description = (
            f"onnxruntime {ort.__version__}, CPU, {threads or 'all'} threads, as reference for"
            f" graphs of the {manifest.dialect} dialect"
        )
        if note:
            self.description += f" ({note})"

    @property
    def numerics(self) -> str:
        return f"reference {machine_key()}"

    @property
    def most_slices(self) -> int:
        return MOST_SLICES if self._batched else 1

    def encode_tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> `(tiles, tokens_per_tile, hidden)`."""
        outputs = self._vision.run([contract.IMAGE_EMBEDDINGS], {contract.TILES: tiles})
        return np.asarray(outputs[0])

    def new_cache(self, capacity: int) -> ReferenceCache:
        """Allocate `2 * layers` buffers; pages are committed when first written."""
        shape = contract.cache_shape(self._spec, capacity)
        try:
            arrays = {
                past: lazy_zeros(shape, self._cache_dtype)
                for past, _ in contract.cache_pairs(self._spec)
            }
        except MemoryError as error:
            raise CapacityError(
                f"no memory for a KV cache of {capacity} tokens", remedies=[Remedy.LOWER_CONTEXT]
            ) from error
        pasts = {name: self._ort_value.ortvalue_from_numpy(a) for name, a in arrays.items()}
        rope = CacheRope(self._rope, self._spec, capacity)
        return ReferenceCache(CacheState(capacity), rope, pasts)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run new rows of each sequence; see `Backend.forward`.

        Sequences with as many rows as another are side by side in a pass.
        """
        several(batch, self.most_slices)
        logits: dict[int, NDArray[np.float32]] = {}
        for count in {len(one.rows) for one in batch}:
            alike = [index for index, one in enumerate(batch) if len(one.rows) == count]
            found = self._pass([batch[index] for index in alike])
            logits |= dict(zip(alike, found, strict=True))
        return np.concatenate([logits[index] for index in range(len(batch))])

    def _pass(self, batch: Sequence[Slice]) -> list[NDArray[np.float32]]:
        """Run as many rows of each sequence; logits of each `(logit rows, vocab)`."""
        storage = self._storage(batch, _keys_read(batch))
        binding = self._language.io_binding()
        for name, values in self._feeds(batch, storage).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        wanted = [len(one.logit_rows) for one in batch]
        logits = np.empty((sum(wanted), self._spec.vocab_size), np.float32)
        binding.bind_ortvalue_output(contract.LOGITS, self._ort_value.ortvalue_from_numpy(logits))
        for past, present in contract.cache_pairs(self._spec):
            binding.bind_ortvalue_input(past, storage.pasts[past])
            if self._in_place:
                binding.bind_ortvalue_output(present, storage.pasts[past])
            else:
                binding.bind_output(present)
        self._language.run_with_iobinding(binding)
        self._append(batch, storage, [] if self._in_place else binding.get_outputs()[1:])
        return np.split(logits, np.cumsum(wanted)[:-1])

    def _feeds(self, batch: Sequence[Slice], storage: Storage) -> dict[str, NDArray[Any]]:
        """Return the inputs of a pass by name, but for the caches."""
        starts, count = [one.cache.state.length for one in batch], len(batch[0].rows)
        places = np.array(starts)[:, np.newaxis] + np.arange(count)
        wanted = [one.logit_rows + count * number for number, one in enumerate(batch)]
        cos, sin = storage.tables if self._batched else (table[0] for table in storage.tables)
        keys = min(_keys_read(batch), storage.tables[0].shape[1])
        return {
            contract.EMBEDDINGS: np.concatenate([one.rows for one in batch]),
            contract.ROPE_COS: cos,
            contract.ROPE_SIN: sin,
            contract.POSITIONS: places if self._batched else places[0],
            contract.KEY_POSITIONS: np.arange(keys),
            contract.LOGIT_ROWS: np.concatenate(wanted),
        }

    def _storage(self, batch: Sequence[Slice], keys: int) -> Storage:
        """Return the cache of one sequence as it is; of several, copies of what is read."""
        tables = []
        for one in batch:
            start, stop = one.cache.state.length, one.cache.state.length + len(one.rows)
            tables.append(_cache(one).rope.tables(start, stop, one.rope_theta))
        if len(batch) == 1:
            return Storage(_cache(batch[0]).pasts, tuple(t[np.newaxis] for t in tables[0]))
        shape = contract.cache_shape(self._spec, keys, len(batch))
        pasts = {name: np.zeros(shape, self._cache_dtype) for name in _cache(batch[0]).pasts}
        for number, one in enumerate(batch):
            for name, past in _cache(one).pasts.items():
                filled = past.numpy()[0, :, : one.cache.state.length]
                pasts[name][number, :, : filled.shape[1]] = filled
        values = {name: self._ort_value.ortvalue_from_numpy(past) for name, past in pasts.items()}
        return Storage(values, tuple(_padded(rows, keys) for rows in zip(*tables, strict=True)))

    def _append(self, batch: Sequence[Slice], storage: Storage, rows: list[Any]) -> None:
        """Put new rows behind the cached ones, where the graph has not.

        Args:
            rows: by cache, those of all sequences `(sequences, kv_heads, tokens, head_dim)`; none
                where the graph wrote them into the storage.
        """
        for number, one in enumerate(batch):
            cache, start = _cache(one), one.cache.state.length
            if storage.pasts is cache.pasts and not rows:
                continue
            new = slice(start, start + len(one.rows))
            for index, (past, _) in enumerate(contract.cache_pairs(self._spec)):
                # A view: ortvalue_from_numpy and numpy() share the buffer on the CPU.
                found = rows[index] if rows else storage.pasts[past]
                values = found.numpy()[number]
                cache.pasts[past].numpy()[0, :, new] = values if rows else values[:, new]


def _cache(new: Slice) -> ReferenceCache:
    assert isinstance(new.cache, ReferenceCache)
    return new.cache


def _keys_read(batch: Sequence[Slice]) -> int:
    """Return how many keys a pass reads: what its longest sequence needs, rounded up."""
    total = max(one.cache.state.length + len(one.rows) for one in batch)
    return -(-total // KEY_BUCKET) * KEY_BUCKET


def _padded(tables: Sequence[NDArray[np.floating]], rows: int) -> NDArray[np.floating]:
    """Return tables of several sequences `(sequences, rows, head_dim / 2)`, cut or with zeros."""
    padded = np.zeros((len(tables), rows, tables[0].shape[1]), tables[0].dtype)
    for own, table in zip(padded, tables, strict=True):
        own[: len(table)] = table[:rows]
    return padded
