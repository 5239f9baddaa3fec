"""ONNX Runtime on a CUDA device, its inputs and its KV cache bound where they are.

Copies, kernels and both sessions share one stream (`user_compute_stream`), so that they follow one
another without waiting; the host waits once a pass, for what it reads. ONNX Runtime goes on with
the CPU where CUDA does not start: that is refused (`sessions.open_session`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import CapacityError, ContextError, DeviceError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import reason
from internvl_edge.bundle.remedies import Remedy, without_gains
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends import MOST_SLICES, Cache, PlainPasses, Slice, several
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.cuda_passes import (
    Binding,
    CudaCache,
    CudaSlot,
    CudaStorage,
    LogitsOutput,
    PassInputs,
    Place,
    cache_of,
)
from internvl_edge.runtime.backends.graph_contract import takes_batch
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.sequence_nodes import SequenceAxis
from internvl_edge.runtime.backends.sessions import Provider, open_graphs
from internvl_edge.runtime.backends.slots import Storages, together
from internvl_edge.runtime.decoding.device_sampling import LargestOfRows, selection_kernels
from internvl_edge.runtime.decoding.sampling import Candidates

_log = logging.getLogger("internvl_edge")


def cuda_provider(cuda: Cuda) -> Provider:
    """ONNX Runtime's CUDA provider on this device and stream.

    Raises:
        DeviceError: the context is not the device's primary one.
    """
    ort = load_onnxruntime()

    with cuda.active():
        cuda.check_primary()
    if hasattr(ort, "preload_dlls"):  # finds the CUDA libraries that came as wheels
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return Provider(
        "cuda",
        {
            "device_id": str(cuda.device),
            "user_compute_stream": str(cuda.stream),
            # float32 means float32; who wants speed exports fp16.
            "use_tf32": "0",
            # Weights are the largest requests: the next power of two could be twice as much.
            "arena_extend_strategy": "kSameAsRequested",
        },
    )


class OnnxRuntimeCudaBackend(PlainPasses):
    """Runs vision.onnx and language.onnx on a CUDA device.

    Args:
        bundle: a verified bundle of the onnxruntime dialect.
        cuda: device, context and stream.
        provider: see `cuda_provider`.
        threads: of operators that only the CPU has; None is one per core.
        sequences: that are decoded in one pass; with more than one, memory for as many caches is
            taken at once.
        context: positions of each of these caches.

    Raises:
        DeviceError: the provider did not start.
        CapacityError: there is no memory for as many caches.
        BundleError: a graph does not load, or its inputs are not the contract's.
    """

    def __init__(
        self,
        bundle: Bundle,
        cuda: Cuda,
        provider: Provider,
        threads: int | None,
        *,
        sequences: int,
        context: int,
    ) -> None:
        ort = load_onnxruntime()

        self._bundle, self._cuda, self._context = bundle, cuda, context
        manifest, vocab = bundle.manifest, bundle.spec.language.vocab_size
        self._rows_dtype = contract.compute_dtype(manifest.vision, manifest.dialect)
        self._place = Place(cuda, provider.device)
        # The host waits for results by itself, once, after queueing their copy.
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if sequences > 1:
            provider = replace(provider, own=SequenceAxis())
        with cuda.active():
            self._vision, self._language = open_graphs(bundle, provider, threads)
            self._batched = takes_batch(self._language)
            rows = sequences if self._batched else 1
            self._storages = Storages(self._slots, rows)
            if self._batched:
                self._storages.reserve()
            elif sequences > 1:
                _log.warning("this decoder's graph takes one sequence a pass on CUDA")
            self._inputs = PassInputs(cuda, bundle)
            self._logits = LogitsOutput(cuda, rows, vocab)
            self._largest = LargestOfRows(cuda, selection_kernels(cuda), rows, vocab)
            self.description = f"onnxruntime {ort.__version__}, {provider.name}, {cuda.name}"
        self._vision_binding = Binding(self._place, self._vision)

    @property
    def numerics(self) -> str:
        return self.description

    @property
    def most_slices(self) -> int:
        return MOST_SLICES if self._batched else 1

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)`, on the device or not, -> `(tiles, tokens_per_tile, hidden)`."""
        vision, language = self._bundle.spec.vision, self._bundle.spec.language
        shape = (len(tiles), vision.tokens_per_tile, language.hidden_size)
        with self._cuda.active():
            held = tiles if isinstance(tiles, DeviceArray) else self._uploaded(tiles)
            rows = self._cuda.empty(shape, self._rows_dtype)
            self._vision_binding.input(contract.TILES, held)
            self._vision_binding.output(contract.IMAGE_EMBEDDINGS, rows)
            self.run(self._vision, self._vision_binding.io)
            host = np.empty(shape, self._rows_dtype)
            self._cuda.download(rows, host)
            self._cuda.synchronize()
        return host

    def new_cache(self, capacity: int) -> CudaCache:
        """Allocate keys, values and the rotary tables, or take a slot where several share passes;
        nothing is allocated while decoding.

        Raises:
            ContextError: slots have fewer positions.
            CapacityError: the memory is not there.
        """
        with self._cuda.active():
            if not self._batched:
                storage = self._allocated(1, capacity)
                return CudaCache(self._cuda, CudaSlot(storage, 0), capacity)
            if capacity > self._context:
                raise ContextError(
                    f"{capacity} tokens > {self._context} that a KV cache has room for",
                    without_gains([Remedy.RAISE_CONTEXT]),
                )
            return CudaCache(self._cuda, self._storages.take(), capacity)

    def is_in_way(self, cache: Cache) -> bool:
        """See `SlottedBackend.is_in_way`."""
        return self._batched and self._storages.is_in_way(cache)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run new rows of each sequence; see `Backend.forward`.

        Next positions of neighbouring caches share a pass; a prompt has a pass of its own.
        """
        logits: dict[int, NDArray[np.float32]] = {}
        with self._cuda.active():
            for group in self._groups(batch):
                parts = [batch[index] for index in group]
                self._queue(parts)
                rows, start = self._logits.read(), 0
                for index, part in zip(group, parts, strict=True):
                    logits[index] = rows[start : start + len(part.logit_rows)]
                    start += len(part.logit_rows)
        if len(batch) == 1:
            return logits[0]
        return np.concatenate([logits[index] for index in range(len(batch))])

    def forward_candidates(self, batch: Sequence[Slice], count: int) -> list[Candidates]:
        """Run one new row of each sequence; see `SelectingBackend.forward_candidates`."""
        found: dict[int, Candidates] = {}
        with self._cuda.active():
            for group in self._groups(batch):
                self._queue([batch[index] for index in group])
                self._largest.queue(self._logits.device)
                chosen = self._largest.read(range(len(group)), count, self._logits.read)
                found |= zip(group, chosen, strict=True)
        return [found[index] for index in range(len(batch))]

    def _groups(self, batch: Sequence[Slice]) -> Iterator[list[int]]:
        """Return what shares a pass, as places in a batch: one after the other, since each moves
        the ends of its slots.

        Raises:
            LimitError: more slices than are taken, or none.
        """
        several(batch, self.most_slices)
        steps: dict[float, list[int]] = {}  # attention rotates all rows of a pass by one table
        for index, new in enumerate(batch):
            if len(new.rows) == 1:
                steps.setdefault(new.rope_theta, []).append(index)
            else:
                yield [index]
        for alike in steps.values():
            for group in together([cache_of(batch[index]).slot for index in alike]):
                yield [alike[place] for place in group]

    def _queue(self, parts: Sequence[Slice]) -> None:
        """Queue a pass over one row of each of some sequences, or over rows of one."""
        binding, rows = self._inputs.bound(parts)
        self._logits.bind(binding, rows)
        self.run(self._language, binding.io)

    def _slots(self, slots: int) -> CudaStorage:
        return self._allocated(slots, self._context)

    def _allocated(self, slots: int, context: int) -> CudaStorage:
        try:
            return CudaStorage(self._bundle, self._place, self._language, context, slots)
        except DeviceError as error:
            several_caches = [Remedy.LOWER_SEQUENCES] if slots > 1 else []
            caches = f"{slots} KV caches" if slots > 1 else "a KV cache"
            raise CapacityError(
                f"no device memory for {caches} of {context} tokens ({reason(error)})",
                remedies=[*several_caches, Remedy.LOWER_CONTEXT],
            ) from error

    def run(self, session: Any, binding: Any) -> None:
        """Queue a session behind what is on the stream."""
        session.run_with_iobinding(binding, self._options)

    def _uploaded(self, tiles: NDArray[np.uint8]) -> DeviceArray:
        device = self._cuda.empty(tiles.shape, np.uint8)
        self._cuda.upload(np.ascontiguousarray(tiles), device)
        return device
