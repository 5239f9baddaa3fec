"""ONNX Runtime on the CPU, the embedded default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import CapacityError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.runtime.backends import Cache, Slice, single
from internvl_edge.runtime.backends.int8_cache import check_int8_cache
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
from internvl_edge.runtime.backends.sessions import PROVIDERS, CpuGraphs

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass
class OrtCache:
    """Keys and values, bound once as input and as output of the same address."""

    state: CacheState
    rope: CacheRope
    storage: dict[tuple[str, str], Any]  # names of past and present -> onnxruntime.OrtValue
    #: A graph, and its binding of the storage.
    bound: tuple[ort.InferenceSession, ort.IOBinding] | None = None

    def binding(self, graph: ort.InferenceSession) -> ort.IOBinding:
        """Return the storage bound to a graph: once, unless it was opened anew."""
        if self.bound is None or self.bound[0] is not graph:
            binding = graph.io_binding()
            for (past, present), buffer in self.storage.items():
                binding.bind_ortvalue_input(past, buffer)
                binding.bind_ortvalue_output(present, buffer)
            self.bound = graph, binding
        return self.bound[1]

    @property
    def nbytes(self) -> int:
        return filled_bytes([value.numpy() for value in self.storage.values()], self.state)

    @property
    def held_bytes(self) -> int:
        one = next(iter(self.storage.values())).numpy()  # all are alike
        buffer = committed_bytes(one, self.state.touched) + BUFFER_BYTES
        return len(self.storage) * buffer + self.state.nbytes + CACHE_BYTES

    def trim(self) -> None:
        """Give back the binding, with the inputs and logits of the last pass, and own tables."""
        self.bound = None
        self.rope.release()

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        assert isinstance(source, OrtCache)
        for names, own in self.storage.items():
            copy_positions(own.numpy(), source.storage[names].numpy(), start, stop)

    def clear(self) -> None:
        """Nothing beyond the length is read."""


def filled_bytes(arrays: list[NDArray[Any]], state: CacheState) -> int:
    """Bytes of the filled positions of arrays `(1, kv_heads, capacity, head_dim)`."""
    return sum(array.nbytes // state.capacity * state.length for array in arrays)


def copy_positions(target: NDArray[Any], source: NDArray[Any], start: int, stop: int) -> None:
    """Positions `start..stop` between arrays `(1, kv_heads, capacity, head_dim)`."""
    target[:, :, start:stop] = source[:, :, start:stop]


class OnnxRuntimeBackend:
    """Runs vision.onnx and language.onnx with ONNX Runtime.

    Args:
        bundle: a verified bundle of the onnxruntime dialect.
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).
        note: why it is this device; part of the description.
        low_memory: hold one graph at a time: for a new image the language graph makes room for
            the vision graph, and the other way round.

    Raises:
        BundleError: a graph does not load, or its inputs are not the contract's.
        DeviceError: integer products are wrong on this machine, or the KV cache is int8 and this
            ONNX Runtime has none.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None, note: str = "", *, low_memory: bool = False
    ) -> None:
        ort = load_onnxruntime()

        self._spec = bundle.spec
        manifest = bundle.manifest
        if manifest.kv == "int8":
            check_int8_cache()
        rope_dtype = contract.rope_dtype(manifest.language, manifest.kv, manifest.dialect)
        self._rows_dtype = contract.compute_dtype(manifest.vision, manifest.dialect)
        self._cache_dtype = contract.CACHE_DTYPE[manifest.kv]
        self._ort_value = ort.OrtValue
        language = bundle.spec.language
        self._rope = RopeTable(language, language.max_context, rope_dtype)
        self._graphs = CpuGraphs(bundle, threads, one_at_a_time=low_memory)
        # A graph gives its activations back after a pass: the other one needs as much.
        self._giving_back = ort.RunOptions()
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._description = (
            f"onnxruntime {ort.__version__}, {PROVIDERS['cpu']}, {threads or 'all'} threads"
        )
        if self._graphs.int4:
            self._description += ", own INT4 kernel"
        if note:
            self._description += f" ({note})"

    @property
    def description(self) -> str:
        return self._description

    @property
    def numerics(self) -> str:
        return f"{PROVIDERS['cpu']} {machine_key()}"

    @property
    def most_slices(self) -> int:
        return 1

    @property
    def prepared(self) -> bool:
        """Whether weights are mapped from prepared files."""
        return self._graphs.prepared

    @property
    def int4(self) -> bool:
        """Whether 4-bit weights are mapped from the bundle, and computed by our own kernel."""
        return self._graphs.int4

    def encode_tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> `(tiles, tokens_per_tile, hidden)`."""
        vision = self._spec.vision
        shape = (len(tiles), vision.tokens_per_tile, self._spec.language.hidden_size)
        rows = np.empty(shape, self._rows_dtype)
        graph = self._graphs.vision
        binding = graph.io_binding()
        binding.bind_cpu_input(contract.TILES, np.ascontiguousarray(tiles))
        output = self._ort_value.ortvalue_from_numpy(rows)
        binding.bind_ortvalue_output(contract.IMAGE_EMBEDDINGS, output)
        graph.run_with_iobinding(binding, self._giving_back)
        return rows

    def new_cache(self, capacity: int) -> OrtCache:
        """Allocate `2 * layers` buffers. On the CPU, pages are committed when first written."""
        try:
            return self._allocate(capacity)
        except MemoryError as error:
            raise CapacityError(
                f"no memory for a KV cache of {capacity} tokens", remedies=[Remedy.LOWER_CONTEXT]
            ) from error

    def _allocate(self, capacity: int) -> OrtCache:
        language = self._spec.language
        shape = contract.cache_shape(language, capacity)
        storage = {
            pair: self._ort_value.ortvalue_from_numpy(lazy_zeros(shape, self._cache_dtype))
            for pair in contract.cache_pairs(language)
        }
        rope = CacheRope(self._rope, language, capacity)
        return OrtCache(CacheState(capacity), rope, storage)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run one pass over new rows; see `Backend.forward`."""
        new = single(batch)
        cache = new.cache
        assert isinstance(cache, OrtCache)
        start = cache.state.length
        total = start + len(new.rows)
        cos, sin = cache.rope.tables(start, total, new.rope_theta)
        graph = self._graphs.language
        binding = cache.binding(graph)
        binding.bind_cpu_input(contract.EMBEDDINGS, np.ascontiguousarray(new.rows))
        binding.bind_cpu_input(contract.ROPE_COS, cos)
        binding.bind_cpu_input(contract.ROPE_SIN, sin)
        binding.bind_cpu_input(contract.LAST_POSITION, np.array([total - 1], np.int32))
        binding.bind_cpu_input(contract.TOTAL_LENGTH, np.array(total, np.int32))
        binding.bind_cpu_input(contract.LOGIT_ROWS, new.logit_rows)
        shape = (len(new.logit_rows), self._spec.language.vocab_size)
        logits = np.empty(shape, np.float32)
        binding.bind_ortvalue_output(contract.LOGITS, self._ort_value.ortvalue_from_numpy(logits))
        # What a decode step takes is little, and wanted again at once.
        options = self._giving_back if len(new.rows) > 1 else None
        graph.run_with_iobinding(binding, options)
        return logits
