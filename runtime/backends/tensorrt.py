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

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import CapacityError, ContextError, DeviceError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends import Cache, Slice, single
from internvl_edge.runtime.backends.cuda import Cuda, Graph
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.backends.plans import PLANS, Engines
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.backends.tensorrt_library import Context, Library, Plan
from internvl_edge.runtime.backends.tensorrt_memory import Buffers, Storage, key_bucket, pieces
from internvl_edge.runtime.decoding.device_sampling import LargestLogits, selection_kernels
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


class TensorRtCache:
    """A KV cache as large as the engine's context; `capacity` positions of it are used."""

    def __init__(self, cuda: Cuda, storage: Storage, rope: RopeTable, state: CacheState) -> None:
        self.state, self.storage = state, storage
        self._cuda, self._rope = cuda, rope

    @property
    def nbytes(self) -> int:
        return self.storage.memory.nbytes  # taken whole when it was allocated

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes, on the device and on the host."""
        tables = sum(table.nbytes for table in self.storage.tables) + 2 * self._rope.cos.nbytes
        return self.storage.memory.nbytes + tables + self.state.nbytes

    def trim(self) -> None:
        """Nothing: all of it was taken when the cache was made."""

    def clear(self) -> None:
        """Queue zeros; see `Cache`."""
        with self._cuda.active():
            self._cuda.clear(self.storage.memory)

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        """Queue one copy: a run of positions in each head of each layer."""
        assert isinstance(source, TensorRtCache)
        own, other = self.storage, source.storage
        offset, width = start * own.row_bytes, (stop - start) * own.row_bytes
        places = (other.memory.address + offset, own.memory.address + offset)
        with self._cuda.active():
            self._cuda.copy_runs(*places, (other.pitch, own.pitch), width, own.heads)

    def prepare(self, start: int, total: int, base: float) -> None:
        """Queue the rotary rows that changed."""
        self._rope.prepare(start, total, base, self._upload)

    def _upload(self, rows: slice) -> None:
        for table, host in zip(self.storage.tables, (self._rope.cos, self._rope.sin), strict=True):
            self._cuda.upload(host[rows], table[rows])


class TensorRtBackend:
    """Runs a bundle's engines.

    Args:
        bundle: a verified bundle of a TensorRT dialect.
        cuda: device, context and stream.
        library: the one the engines were built with.
        engines: built for this machine; see `find_engines`.

    Raises:
        BundleError: a plan is not the one that was built, does not load or breaks the contract.
        DeviceError: not enough device memory.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, library: Library, engines: Engines) -> None:
        self._bundle, self._cuda = bundle, cuda
        self.limits = engines.manifest.limits
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
            self._check_language(self._language)
            largest = max(vision.scratch_bytes, self._language.scratch_bytes)
            self._scratch = cuda.empty((largest,), np.uint8)
            self._vision = vision.context(self._scratch.address)
            self._prefill = self._language.context(self._scratch.address)
            self._buffers = Buffers(bundle, cuda, self.limits, self._dtype)
            self._prefill.bind(self._buffers.addresses())
            kernels = selection_kernels(cuda)
            vocab = spec.language.vocab_size
            self._largest = None if kernels is None else LargestLogits(cuda, kernels, vocab)
            self.description = f"{library.name} {library.version}, {cuda.name}"
        plans = engines.manifest.files
        # A plan built again may compute with other tactics, and round differently.
        self.numerics = f"{self.description} {plans[PLANS[contract.VISION_GRAPH]].sha256}"
        self.most_slices = 1
        self._free: list[Storage] = []

    @property
    def takes_drafts(self) -> bool:
        return False

    @property
    def holds_scores(self) -> bool:
        return True

    @property
    def turns(self) -> None:
        return None

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
        """Memory of a cache that is no longer used, with its captured steps, or new memory.

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
            storage = self._free.pop() if self._free else self._allocated()
        rope = RopeTable(self._bundle.spec.language, limits.context, self._dtype)
        cache = TensorRtCache(self._cuda, storage, rope, CacheState(capacity))
        weakref.finalize(cache, _give_back, self._free, storage).atexit = False
        return cache

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run one pass over new rows; see `Backend.forward`."""
        new = single(batch)
        cache = new.cache
        assert isinstance(cache, TensorRtCache)
        start, tokens = cache.state.length, len(new.rows)
        run = partial(self._pass, cache.storage)
        with self._cuda.active():
            cache.prepare(start, start + tokens, new.rope_theta)
            parts = [
                run(new.rows[piece.start : piece.stop], start + piece.start, piece.wanted)
                for piece in pieces(tokens, new.logit_rows, self.limits)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def forward_candidates(self, batch: Sequence[Slice], count: int) -> list[Candidates]:
        """Run one pass over one new row; see `SelectingBackend.forward_candidates`."""
        new = single(batch)
        cache = new.cache
        assert isinstance(cache, TensorRtCache)
        start = cache.state.length
        with self._cuda.active():
            cache.prepare(start, start + 1, new.rope_theta)
            self._queue(cache.storage, new.rows, start, new.logit_rows)
            found = None if self._largest is None else self._largest.read(count)
            return [found or Candidates(self._buffers.read_logits(1)[0])]

    def _pass(
        self,
        storage: Storage,
        embeddings: NDArray[np.floating],
        start: int,
        wanted: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """A part of a pass; logits of the wanted rows `(rows, vocab)`."""
        # An engine has no shape of no rows: one is computed and left.
        rows = wanted if len(wanted) else np.zeros(1, np.int64)
        self._queue(storage, embeddings, start, rows)
        return self._buffers.read_logits(len(rows))[: len(wanted)]

    def _queue(
        self,
        storage: Storage,
        embeddings: NDArray[np.floating],
        start: int,
        rows: NDArray[np.int64],
    ) -> None:
        buffers, tokens = self._buffers, len(embeddings)
        keys = key_bucket(start + tokens, self.limits.context)
        buffers.embeddings.write(embeddings)
        buffers.positions.write(np.arange(start, start + tokens))
        buffers.rows.write(rows)
        if tokens == 1:
            self._step(storage, keys)()
        else:
            self._prefill.bind(storage.addresses(buffers.fresh, tokens))
            self._prefill.shape(self._shapes(tokens, keys, len(rows)))
            self._prefill.execute(self._cuda.stream)
        if buffers.fresh is not None:
            width = tokens * storage.row_bytes
            target = storage.memory.address + start * storage.row_bytes
            pitches = (width, storage.pitch)
            self._cuda.copy_runs(buffers.fresh.address, target, pitches, width, storage.heads)

    def _choose(self) -> None:
        """Queue the choice among the logits of the first row."""
        if self._largest is not None:
            vocab = self._bundle.spec.language.vocab_size
            self._largest.queue(self._buffers.logits[:1].of_shape((vocab,)))

    def _step(self, storage: Storage, keys: int) -> Callable[[], None]:
        if keys not in storage.steps:
            context = self._language.context(self._scratch.address)
            context.bind(self._buffers.addresses())
            context.bind(storage.addresses(self._buffers.fresh, 1))
            context.shape(self._shapes(1, keys, 1))
            storage.steps[keys] = CapturedStep(self._cuda, context, self._choose)
        return storage.steps[keys]

    def _shapes(self, tokens: int, keys: int, rows: int) -> dict[str, tuple[int, ...]]:
        return {
            contract.EMBEDDINGS: (tokens, self._bundle.spec.language.hidden_size),
            contract.POSITIONS: (tokens,),
            contract.KEY_POSITIONS: (keys,),
            contract.LOGIT_ROWS: (rows,),
        }

    def _allocated(self) -> Storage:
        try:
            return Storage(self._bundle, self._cuda, self.limits, self._dtype)
        except DeviceError as error:
            raise CapacityError(
                f"no device memory for a KV cache of {self.limits.context} tokens"
                f" ({reason(error)}); rebuild the engines with 'internvl-edge build --max-context'"
                " and fewer"
            ) from error

    def _check_language(self, plan: Plan) -> None:
        manifest, spec = self._bundle.manifest, self._bundle.spec.language
        kinds = (manifest.kv, manifest.dialect)
        plan.check(
            contract.language_inputs(spec, manifest.language, *kinds),
            contract.language_outputs(spec, *kinds),
            context=self.limits.context,
        )

    def _uploaded(self, tiles: NDArray[np.uint8]) -> DeviceArray:
        device = self._cuda.empty(tiles.shape, np.uint8)
        self._cuda.upload(np.ascontiguousarray(tiles), device)
        return device


def _give_back(free: list[Storage], storage: Storage) -> None:
    """Keep the memory of one cache for the next; more at once would never be given back."""
    if not free:
        free.append(storage)
