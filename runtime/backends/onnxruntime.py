"""ONNX Runtime on the CPU, the embedded default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import LANGUAGE_GRAPH
from internvl_edge.bundle.errors import CapacityError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.kernels.operators.turns import Turns
from internvl_edge.runtime.backends import MOST_SLICES, Slice
from internvl_edge.runtime.backends.int8_cache import check_int8_cache
from internvl_edge.runtime.backends.machine import machine_key
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.ort_cache import OrtCache, allocated
from internvl_edge.runtime.backends.ort_passes import language_pass
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.backends.sessions import PROVIDERS, CpuGraphs
from internvl_edge.runtime.heap import give_back

#: Most rows of a pass after which ONNX Runtime keeps what it took.
_STEP_ROWS = 64


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
        tower = self._graphs.tower.library  # whose operators rest
        self._turns = None if tower is None else Turns(tower)
        # A graph gives its activations back after a pass: the other one needs as much.
        self._giving_back = ort.RunOptions()
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.description = (
            f"onnxruntime {ort.__version__}, {PROVIDERS['cpu']}, {threads or 'all'} threads"
        )
        if LANGUAGE_GRAPH in self._graphs.mapped:
            self.description += ", own kernel for weights in blocks"
        if self._graphs.attends:
            self.description += ", own attention"
        if self._graphs.tower.library is not None:
            self.description += ", own vision kernels"
        if note:
            self.description += f" ({note})"

    @property
    def numerics(self) -> str:
        tower = "" if self._graphs.tower.library is None else " own tower"
        return f"{PROVIDERS['cpu']} {machine_key()}{tower}"

    @property
    def most_slices(self) -> int:
        return MOST_SLICES if self._graphs.attends else 1

    @property
    def prepared(self) -> bool:
        """Whether weights are mapped from prepared files."""
        return self._graphs.prepared

    @property
    def mapped(self) -> frozenset[str]:
        """The graphs whose matrices are mapped from the bundle, and multiplied by our kernels."""
        return self._graphs.mapped

    @property
    def takes_drafts(self) -> bool:
        return True

    @property
    def holds_scores(self) -> bool:
        return not self._graphs.attends

    @property
    def turns(self) -> Turns | None:
        return self._turns

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
        give_back()
        return rows

    def new_cache(self, capacity: int) -> OrtCache:
        """Allocate keys and values; see `ort_cache.allocated`."""
        try:
            return allocated(self._spec.language, self._cache_dtype, capacity, self._rope)
        except MemoryError as error:
            raise CapacityError(
                f"no memory for a KV cache of {capacity} tokens", remedies=[Remedy.LOWER_CONTEXT]
            ) from error

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run one pass over new rows; see `Backend.forward`."""
        graph = self._graphs.language
        new = language_pass(batch, self._spec.language, self._graphs.attends)
        binding = new.bound(graph)
        shape = (new.logit_rows, self._spec.language.vocab_size)
        logits = np.empty(shape, np.float32)
        binding.bind_ortvalue_output(contract.LOGITS, self._ort_value.ortvalue_from_numpy(logits))
        # What a decode step takes is little, and wanted again at once.
        if len(new.feeds[contract.EMBEDDINGS]) <= _STEP_ROWS:
            graph.run_with_iobinding(binding, None)
        else:
            graph.run_with_iobinding(binding, self._giving_back)
            give_back()
        return logits
