"""TensorRT engines: prefill by shape, decoding as one captured CUDA graph per stretch of the cache.

Everything lies where it lies: inputs, outputs and cache have fixed addresses, contexts share one
block of scratch memory, and a step of decoding uploads a row, launches a graph and waits once, for
the token or the logits. A captured graph belongs to the context it was captured from, its shapes
and its addresses; so each has a context of its own, by storage of the cache and number of keys
read.

The choice of the largest logits is part of every captured step: the 8 bytes of one or 512 of 64 are
copied, and the 370 KB of InternLM2's 92,553 logits only for who asks for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import Tensor
from internvl_edge.bundle.errors import CapacityError, ContextError, DeviceError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends import MOST_SLICES, Cache, PlainPasses, Slice, several
from internvl_edge.runtime.backends.cuda import Box, Cuda, Graph
from internvl_edge.runtime.backends.plans import PLANS, Engines
from internvl_edge.runtime.backends.slots import Storages, together
from internvl_edge.runtime.backends.tensorrt_cache import (
    EngineSlot,
    EngineStorage,
    Span,
    TensorRtCache,
)
from internvl_edge.runtime.backends.tensorrt_library import Context, Library
from internvl_edge.runtime.backends.tensorrt_memory import Buffers, key_bucket, pieces
from internvl_edge.runtime.decoding.device_sampling import LargestOfRows, selection_kernels
from internvl_edge.runtime.decoding.sampling import Candidates


class CapturedStep:
    """Decoding one token over so many keys: run once, then captured, then launched.

    Args:
        choose: queues the choice of the next token behind the pass.
    """

    def __init__(self, cuda: Cuda, context: Context, choose: Callable[[], None]) -> None:
        self._cuda, self._context, self._choose = cuda, context, choose
        self._run = False
        self._graph: Graph | None = None

    def __call__(self) -> None:
        """Queue the step."""
        if self._graph is not None:
            self._graph.launch()
        elif not self._run or not self._context.capturable(self._cuda.stream):
            # Work on new shapes that is not for the GPU: must not be captured.
            self._queue()
            self._run = True
        else:
            with self._cuda.capture() as graph:
                self._queue()
            self._graph = graph
            graph.launch()

    def _queue(self) -> None:
        self._context.execute(self._cuda.stream)
        self._choose()


class TensorRtBackend(PlainPasses):
    """Runs a bundle's engines.

    Args:
        bundle: a verified bundle of a TensorRT dialect.
        cuda: device, context and stream.
        library: the one the engines were built with.
        engines: built for this machine; see `find_engines`.
        sequences: that are decoded in one pass, no more than the engines are for; None: as many.

    Raises:
        BundleError: a plan is not the one that was built, does not load or breaks the contract.
        DeviceError: not enough device memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        cuda: Cuda,
        library: Library,
        engines: Engines,
        sequences: int | None = None,
    ) -> None:
        self._bundle, self._cuda = bundle, cuda
        limits = engines.manifest.limits
        self.limits = replace(limits, sequences=sequences or limits.sequences)
        manifest, spec = bundle.manifest, bundle.spec
        self._dtype = contract.compute_dtype(manifest.language, manifest.dialect)
        self._rows_dtype = contract.compute_dtype(manifest.vision, manifest.dialect)
        with cuda.active():
            with engines.plan(contract.VISION_GRAPH) as path:
                vision = library.read_plan(path)
            vision.check(
                contract.vision_inputs(spec.vision),
                contract.vision_outputs(
                    spec.vision, spec.language, manifest.vision, manifest.dialect
                ),
            )
            with engines.plan(contract.LANGUAGE_GRAPH) as path:
                self._language = library.read_plan(path)
            self._inputs = self._checked_inputs()
            largest = max(vision.scratch_bytes, self._language.scratch_bytes)
            self._scratch = cuda.empty((largest,), np.uint8)
            self._vision = vision.context(self._scratch.address)
            self._prefill = self._language.context(self._scratch.address)
            self._buffers = Buffers(bundle, cuda, self.limits, self._dtype)
            self._prefill.bind(self._buffers.addresses())
            rows, vocab = self.limits.sequences, spec.language.vocab_size
            self._largest = LargestOfRows(cuda, selection_kernels(cuda), rows, vocab)
            self.description = f"{library.name} {library.version}, {cuda.name}"
        plans = engines.manifest.files
        # A plan built again may compute with other tactics, and round differently.
        self.numerics = f"{self.description} {plans[PLANS[contract.VISION_GRAPH]].sha256}"
        self._storages = Storages(self._allocated, self.limits.sequences)

    @property
    def most_slices(self) -> int:
        return 1 if self.limits.sequences == 1 else MOST_SLICES

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)`, on the device or not, -> `(tiles, tokens_per_tile, hidden)`."""
        vision, language = self._bundle.spec.vision, self._bundle.spec.language
        shape = (len(tiles), vision.tokens_per_tile, language.hidden_size)
        host = np.empty(shape, self._rows_dtype)
        with self._cuda.active():
            held = tiles if isinstance(tiles, DeviceArray) else self._uploaded(tiles)
            rows = self._cuda.empty(shape, self._rows_dtype)
            for start in range(0, len(tiles), self.limits.tiles):
                batch = held[start : start + self.limits.tiles]
                out = rows[start : start + self.limits.tiles]
                self._vision.bind(
                    {contract.TILES: batch.address, contract.IMAGE_EMBEDDINGS: out.address}
                )
                self._vision.shape({contract.TILES: batch.shape})
                self._vision.execute(self._cuda.stream)
            self._cuda.download(rows, host)
            self._cuda.synchronize()
        return host

    def new_cache(self, capacity: int) -> TensorRtCache:
        """A place of a cache that is no longer used, with its captured steps, or new memory.

        Raises:
            ContextError: the engine's context is shorter.
            CapacityError: the memory is not there.
        """
        limits = self.limits
        if capacity > limits.context:
            raise ContextError(
                f"{capacity} tokens > {limits.context} the engines were built for; rebuild with"
                f" 'internvl-edge build {named(self._bundle.path)} --max-context {capacity}'"
            )
        with self._cuda.active():
            language = self._bundle.spec.language
            return TensorRtCache(self._cuda, self._storages, language, capacity)

    def is_in_way(self, cache: Cache) -> bool:
        """See `SlottedBackend.is_in_way`."""
        return self._storages.is_in_way(cache)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run new rows of each sequence; see `Backend.forward`.

        Next positions of neighbouring caches share a pass; a prompt has passes of its own.
        """
        logits: dict[int, NDArray[np.float32]] = {}
        with self._cuda.active():
            for group in self._groups(batch):
                parts = [batch[index] for index in group]
                if len(parts[0].rows) > 1:
                    logits[group[0]] = self._prompt(parts[0])
                    continue
                places = self._queue_step(parts)
                rows = self._buffers.read_logits(places[-1] + 1)
                for index, part, place in zip(group, parts, places, strict=True):
                    logits[index] = rows[place : place + 1][part.logit_rows]
        return np.concatenate([logits[index] for index in range(len(batch))])

    def forward_candidates(self, batch: Sequence[Slice], count: int) -> list[Candidates]:
        """Run one new row of each sequence; see `SelectingBackend.forward_candidates`."""
        found: dict[int, Candidates] = {}
        with self._cuda.active():
            for group in self._groups(batch):
                places = self._queue_step([batch[index] for index in group])
                read = partial(self._buffers.read_logits, places[-1] + 1)
                found |= zip(group, self._largest.read(places, count, read), strict=True)
        return [found[index] for index in range(len(batch))]

    def _groups(self, batch: Sequence[Slice]) -> Iterator[list[int]]:
        """Return what shares a pass, as places in a batch, in the order of their slots.

        Raises:
            LimitError: more slices than are taken, or none.
        """
        several(batch, self.most_slices)
        steps = [index for index, new in enumerate(batch) if len(new.rows) == 1]
        yield from ([index] for index in range(len(batch)) if index not in steps)
        for group in together([_cache(batch[index]).slot for index in steps]):
            yield [steps[place] for place in group]

    def _prompt(self, new: Slice) -> NDArray[np.float32]:
        """Run rows of one sequence, in as many passes as the engine needs; logits of those wanted
        `(rows, vocab)`."""
        cache = _cache(new)
        start, tokens = cache.state.length, len(new.rows)
        cache.prepare(start, start + tokens, new.rope_theta)
        parts = []
        for piece in pieces(tokens, new.logit_rows, self.limits):
            # An engine has no shape of no rows: one is computed and left.
            rows = piece.wanted if len(piece.wanted) else np.zeros(1, np.int64)
            self._queue_prompt(
                cache.slot, new.rows[piece.start : piece.stop], start + piece.start, rows
            )
            parts.append(self._buffers.read_logits(len(rows))[: len(piece.wanted)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _queue_prompt(
        self,
        slot: EngineSlot,
        embeddings: NDArray[np.floating],
        start: int,
        rows: NDArray[np.int64],
    ) -> None:
        """Queue a pass over rows of one sequence, of which some get logits."""
        buffers, tokens, storage = self._buffers, len(embeddings), slot.storage
        keys = key_bucket(start + tokens, self.limits.context)
        self._write(embeddings, np.arange(start, start + tokens), rows)
        slot.end = start + tokens
        if tokens == 1 and len(rows) == 1:
            self._step(storage, Span(slot.index, 1, keys))()
        else:
            self._prefill.bind(storage.addresses(slot.index, buffers.fresh, tokens))
            self._prefill.shape(self._shapes(1, tokens, keys, len(rows)))
            self._prefill.execute(self._cuda.stream)
        self._append(slot, (0, 1), start, start + tokens)

    def _queue_step(self, parts: Sequence[Slice]) -> list[int]:
        """Queue a pass over one row of each sequence, their slots in order; return which rows of
        the pass are theirs."""
        caches = [_cache(part) for part in parts]
        storage, first = caches[0].slot.storage, caches[0].slot.index
        count = caches[-1].slot.index + 1 - first
        hidden = self._bundle.spec.language.hidden_size
        embeddings = np.zeros((count, hidden), self._dtype)
        positions = np.array(storage.ends[first : first + count])
        places = [cache.slot.index - first for cache in caches]
        for part, cache, place in zip(parts, caches, places, strict=True):
            start = cache.state.length
            cache.prepare(start, start + 1, part.rope_theta)
            embeddings[place], positions[place] = part.rows[0], start
            cache.slot.end = start + 1
        longest = max(cache.slot.end for cache in caches)
        self._write(embeddings, positions, np.arange(count))
        self._step(storage, Span(first, count, key_bucket(longest, self.limits.context)))()
        for cache, place in zip(caches, places, strict=True):
            self._append(cache.slot, (place, count), cache.slot.end - 1, cache.slot.end)
        return places

    def _write(
        self,
        embeddings: NDArray[np.floating],
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> None:
        """Queue the inputs of a pass."""
        self._buffers.embeddings.write(embeddings)
        self._buffers.positions.write(positions)
        self._buffers.rows.write(rows)

    def _append(self, slot: EngineSlot, place: tuple[int, int], start: int, stop: int) -> None:
        """Queue the copy of new keys and values that the engine put nowhere.

        Args:
            place: which sequence of the pass, and of how many.
        """
        fresh, storage = self._buffers.fresh, slot.storage
        if fresh is not None:
            width = (stop - start) * storage.row_bytes
            own = fresh.address + place[0] * storage.kv_heads * width
            box = Box(own, width, place[1] * storage.kv_heads)
            slot.copy(self._cuda, box, start, stop)

    def _step(self, storage: EngineStorage, span: Span) -> Callable[[], None]:
        if span not in storage.steps:
            context = self._language.context(self._scratch.address)
            context.bind(self._buffers.addresses())
            context.bind(storage.addresses(span.first, self._buffers.fresh, span.count))
            context.shape(self._shapes(span.count, 1, span.keys, span.count))
            choose = partial(self._largest.queue, self._buffers.logits[: span.count])
            storage.steps[span] = CapturedStep(self._cuda, context, choose)
        return storage.steps[span]

    def _shapes(
        self, sequences: int, each: int, keys: int, rows: int
    ) -> dict[str, tuple[int, ...]]:
        """Return shapes of the inputs that have one for each pass."""
        sizes = {
            contract.BATCH: sequences,
            "each": each,
            "tokens": sequences * each,
            "keys": keys,
            "rows": rows,
        }
        fixed = {"context": self.limits.context}
        return {
            tensor.name: tensor.sized(sizes | fixed)
            for tensor in self._inputs
            if not sizes.keys().isdisjoint(tensor.shape)
        }

    def _allocated(self, slots: int) -> EngineStorage:
        try:
            return EngineStorage(self._bundle, self._cuda, self.limits.context, slots, self._dtype)
        except DeviceError as error:
            raise CapacityError(
                f"no device memory for a KV cache of {self.limits.context} tokens"
                f" ({reason(error)}); rebuild the engines with 'internvl-edge build --max-context'"
                " and fewer"
            ) from error

    def _checked_inputs(self) -> list[Tensor]:
        """Return the inputs of the language engine, which are the contract's."""
        manifest, spec, plan = self._bundle.manifest, self._bundle.spec.language, self._language
        given = manifest.kv, manifest.dialect, plan.rank(contract.POSITIONS) > 1
        inputs = contract.language_inputs(spec, manifest.language, *given)
        outputs = contract.language_outputs(spec, *given)
        plan.check(inputs, outputs, context=self.limits.context)
        return inputs

    def _uploaded(self, tiles: NDArray[np.uint8]) -> DeviceArray:
        device = self._cuda.empty(tiles.shape, np.uint8)
        self._cuda.upload(np.ascontiguousarray(tiles), device)
        return device


def _cache(new: Slice) -> TensorRtCache:
    assert isinstance(new.cache, TensorRtCache)
    return new.cache
