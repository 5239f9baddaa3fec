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
from internvl_edge.runtime.backends import Cache, Slice, single
from internvl_edge.runtime.backends.kv_cache import (
    BUFFER_BYTES,
    CACHE_BYTES,
    CacheState,
    committed_bytes,
    lazy_zeros,
)
from internvl_edge.runtime.backends.machine import machine_key
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.rope_table import CacheRope, RopeTable
from internvl_edge.runtime.backends.sessions import Provider, open_graphs

#: The cache is read in multiples of this, as an engine's captured graphs do.
KEY_BUCKET = 256


@dataclass
class ReferenceCache:
    """Keys and values by input name, written in place."""

    state: CacheState
    rope: CacheRope
    pasts: dict[str, Any]  # onnxruntime.OrtValue (1, kv_heads, capacity, head_dim)

    @property
    def nbytes(self) -> int:
        """Memory its filled positions take."""
        arrays = [past.numpy() for past in self.pasts.values()]
        return sum(array.nbytes // self.state.capacity * self.state.length for array in arrays)

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes."""
        one = next(iter(self.pasts.values())).numpy()  # all are alike
        buffer = committed_bytes(one, self.state.touched) + BUFFER_BYTES
        return len(self.pasts) * buffer + self.state.nbytes + CACHE_BYTES

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
            past.numpy()[:, :, start:stop] = source.pasts[name].numpy()[:, :, start:stop]


class ReferenceBackend:
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
        self._description = (
            f"onnxruntime {ort.__version__}, CPU, {threads or 'all'} threads, as reference for"
            f" graphs of the {manifest.dialect} dialect"
        )
        if note:
            self._description += f" ({note})"

    @property
    def description(self) -> str:
        return self._description

    @property
    def numerics(self) -> str:
        return f"reference {machine_key()}"

    @property
    def most_slices(self) -> int:
        return 1

    @property
    def takes_drafts(self) -> bool:
        return False

    @property
    def holds_scores(self) -> bool:
        return True

    @property
    def turns(self) -> None:
        return None

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
        """Run one pass over new rows; see `Backend.forward`."""
        new = single(batch)
        cache = new.cache
        assert isinstance(cache, ReferenceCache)
        start = cache.state.length
        total = start + len(new.rows)
        cos, sin = cache.rope.tables(start, total, new.rope_theta)
        keys = min(-(-total // KEY_BUCKET) * KEY_BUCKET, cache.state.capacity)
        binding = self._language.io_binding()
        binding.bind_cpu_input(contract.EMBEDDINGS, np.ascontiguousarray(new.rows))
        binding.bind_cpu_input(contract.ROPE_COS, cos)
        binding.bind_cpu_input(contract.ROPE_SIN, sin)
        binding.bind_cpu_input(contract.POSITIONS, np.arange(start, total))
        binding.bind_cpu_input(contract.KEY_POSITIONS, np.arange(keys))
        binding.bind_cpu_input(contract.LOGIT_ROWS, new.logit_rows)
        logits = np.empty((len(new.logit_rows), self._spec.vocab_size), np.float32)
        binding.bind_ortvalue_output(contract.LOGITS, self._ort_value.ortvalue_from_numpy(logits))
        for past, present in contract.cache_pairs(self._spec):
            buffer = cache.pasts[past]
            binding.bind_ortvalue_input(past, buffer)
            if self._in_place:
                binding.bind_ortvalue_output(present, buffer)
            else:
                binding.bind_output(present)
        self._language.run_with_iobinding(binding)
        if not self._in_place:
            self._append(cache, binding.get_outputs()[1:], start)
        return logits

    def _append(self, cache: ReferenceCache, rows: list[Any], start: int) -> None:
        """Put new rows `(1, kv_heads, tokens, head_dim)` behind the cached ones."""
        for (past, _), value in zip(contract.cache_pairs(self._spec), rows, strict=True):
            new = value.numpy()
            # A view: ortvalue_from_numpy and numpy() share the buffer on the CPU.
            cache.pasts[past].numpy()[:, :, start : start + new.shape[2]] = new
