"""A KV cache whose buffers ONNX Runtime reads and writes where they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.backends.kv_cache import (
    CacheState,
    copy_positions,
    filled_bytes,
    held_bytes,
    lazy_zeros,
)
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.rope_table import CacheRope, RopeTable

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

    @functools.cached_property
    def addresses(self) -> NDArray[np.int64]:
        """Where keys and values are, layer by layer."""
        return np.array([buffer.data_ptr() for buffer in self.storage.values()], np.int64)

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
        return held_bytes([value.numpy() for value in self.storage.values()], self.state)

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


def allocated(language: LanguageSpec, dtype: str, capacity: int, shared: RopeTable) -> OrtCache:
    """Allocate `2 * layers` buffers, whose pages are committed when first written.

    Args:
        dtype: of keys and values.
        shared: rotary tables of the trained base.

    Raises:
        MemoryError: there is no room for them.
    """
    ort = load_onnxruntime()
    shape = contract.cache_shape(language, capacity)
    storage = {
        pair: ort.OrtValue.ortvalue_from_numpy(lazy_zeros(shape, dtype))
        for pair in contract.cache_pairs(language)
    }
    return OrtCache(CacheState(capacity), CacheRope(shared, language, capacity), storage)
