"""ONNX Runtime on a CUDA device, its inputs and its KV cache bound where they are.

Copies, kernels and both sessions share one stream (`user_compute_stream`), so that they follow one
another without waiting; the host waits once a pass, for what it reads. ONNX Runtime goes on with
the CPU where CUDA does not start: that is refused (`sessions.open_session`).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import CapacityError, DeviceError
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import reason
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.kernels.cuda import CudaKernels
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends import Cache, Slice, single
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.rope_table import RopeTable
from internvl_edge.runtime.backends.sessions import Provider, open_graphs
from internvl_edge.runtime.decoding.device_sampling import LargestLogits, selection_kernels
from internvl_edge.runtime.decoding.sampling import Candidates


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


@dataclass(frozen=True)
class Place:
    """Binds device memory to the graphs' inputs and outputs."""

    cuda: Cuda
    memory: str  # ONNX Runtime's name for it

    def bind_input(self, binding: Any, name: str, array: DeviceArray) -> None:
        binding.bind_input(name, self.memory, self.cuda.device, *_described(array))

    def bind_output(self, binding: Any, name: str, array: DeviceArray) -> None:
        binding.bind_output(name, self.memory, self.cuda.device, *_described(array))


class StagedInput:
    """An input of one binding that stays where it is: pinned memory, copied to the device."""

    def __init__(self, place: Place, binding: Any, name: str, dtype: DTypeLike) -> None:
        self._place, self._binding, self._name = place, binding, name
        self._dtype = np.dtype(dtype)
        self._host: NDArray[Any] = np.empty(0, self._dtype)
        self._device: DeviceArray | None = None
        self._bound: tuple[int, ...] = ()

    def write(self, values: NDArray[Any]) -> None:
        """Queue the copy of `values`; memory grows to the longest pass, and then stays."""
        rows, cuda = len(values), self._place.cuda
        if self._device is None or rows > len(self._device):
            self._bound = ()  # to memory that goes
            self._host = cuda.pinned(values.shape, self._dtype)
            self._device = cuda.empty(values.shape, self._dtype)
        self._host[:rows] = values
        part = self._device[:rows]
        cuda.upload(self._host[:rows], part)
        if self._bound != values.shape:
            self._bound = ()
            self._place.bind_input(self._binding, self._name, part)
            self._bound = values.shape


class LogitsOutput:
    """The logits of one binding: on the device, of which the asked rows are copied back, or the
    largest of one row."""

    def __init__(self, place: Place, binding: Any, vocab: int, kernels: CudaKernels | None) -> None:
        self._place, self._binding, self._vocab = place, binding, vocab
        self._largest = None if kernels is None else LargestLogits(place.cuda, kernels, vocab)
        self._device = place.cuda.empty((1, vocab), np.float32)
        self._row = place.cuda.pinned((1, vocab), np.float32)  # decoding reads one row a pass
        self._bound = 0

    @property
    def nbytes(self) -> int:
        """Memory it takes, on the device and on the host."""
        return self._device.nbytes + self._row.nbytes

    def bind(self, rows: int) -> None:
        """Make room for `rows` and bind it."""
        if rows > len(self._device):
            self._bound = 0  # to memory that goes
            self._device = self._place.cuda.empty((rows, self._vocab), np.float32)
        if rows != self._bound:
            self._bound = 0
            self._place.bind_output(self._binding, contract.LOGITS, self._device[:rows])
            self._bound = rows

    def read(self) -> NDArray[np.float32]:
        """Wait for the bound rows."""
        cuda, rows = self._place.cuda, self._bound
        host = self._row if rows == 1 else np.empty((rows, self._vocab), np.float32)
        cuda.download(self._device[:rows], host)
        cuda.synchronize()
        return host.copy() if rows == 1 else host

    def candidates(self, count: int) -> Candidates:
        """Wait for at least the `count` largest of the one bound row."""
        if self._largest is None:
            return Candidates(self.read()[0])
        self._largest.queue(self._device[:1].of_shape((self._vocab,)))
        return self._largest.read(count) or Candidates(self.read()[0])


class CudaCache:
    """Keys and values in one block of device memory, bound as past and as present."""

    def __init__(
        self,
        place: Place,
        binding: Any,
        bundle: Bundle,
        capacity: int,
        kernels: CudaKernels | None,
    ) -> None:
        language, cuda = bundle.spec.language, place.cuda
        self.state = CacheState(capacity)
        self.binding = binding
        manifest = bundle.manifest
        rope = contract.rope_dtype(manifest.language, manifest.kv, manifest.dialect)
        self._rope = RopeTable(language, capacity, rope)
        # Cleared: attention multiplies what lies beyond the length by zero, and NaN stays NaN.
        self._memory = cuda.zeros(
            (2 * language.num_hidden_layers, *contract.cache_shape(language, capacity)),
            contract.CACHE_DTYPE[manifest.kv],
        )
        for index, (past, present) in enumerate(contract.cache_pairs(language)):
            part = self._memory[index : index + 1].of_shape(self._memory.shape[1:])
            place.bind_input(binding, past, part)
            place.bind_output(binding, present, part)
        self._tables = [cuda.zeros(self._rope.cos.shape, rope) for _ in range(2)]
        for name, table in zip((contract.ROPE_COS, contract.ROPE_SIN), self._tables, strict=True):
            place.bind_input(binding, name, table)
        dtype = contract.compute_dtype(manifest.language, manifest.dialect)
        self._embeddings = StagedInput(place, binding, contract.EMBEDDINGS, dtype)
        self._last = StagedInput(place, binding, contract.LAST_POSITION, np.int32)
        self._rows = StagedInput(place, binding, contract.LOGIT_ROWS, np.int64)
        self.logits = LogitsOutput(place, binding, language.vocab_size, kernels)
        self._cuda = cuda

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes  # taken whole when it was allocated

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes, on the device and on the host."""
        tables = 2 * (self._tables[0].nbytes + self._rope.cos.nbytes)
        return self._memory.nbytes + tables + self.logits.nbytes + self.state.nbytes

    def trim(self) -> None:
        """Nothing: all of it was taken when the cache was made."""

    def clear(self) -> None:
        """Queue zeros; see `Cache`."""
        with self._cuda.active():
            self._cuda.clear(self._memory)

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        """Queue one copy for each head of each layer: their positions lie apart."""
        assert isinstance(source, CudaCache)
        *planes, own_capacity, width = self._memory.shape
        row = width * self._memory.dtype.itemsize
        with self._cuda.active():
            for plane in range(math.prod(planes)):
                own = self._memory.address + (plane * own_capacity + start) * row
                other = source._memory.address + (plane * source.state.capacity + start) * row
                self._cuda.copy(other, own, (stop - start) * row)

    def feed(self, new: Slice) -> None:
        """Queue the inputs of one pass; of the rotary tables only the rows that changed."""
        start = self.state.length
        total = start + len(new.rows)
        self._rope.prepare(start, total, new.rope_theta, self._upload_rope)
        self._embeddings.write(new.rows)
        self._last.write(np.array([total - 1]))
        self._rows.write(new.logit_rows)
        self.logits.bind(len(new.logit_rows))
        # Read on the host, by the attention operator when it is queued.
        self.binding.bind_cpu_input(contract.TOTAL_LENGTH, np.array(total, np.int32))

    def _upload_rope(self, rows: slice) -> None:
        for table, host in zip(self._tables, (self._rope.cos, self._rope.sin), strict=True):
            self._cuda.upload(host[rows], table[rows])


class OnnxRuntimeCudaBackend:
    """Runs vision.onnx and language.onnx on a CUDA device.

    Args:
        bundle: a verified bundle of the onnxruntime dialect.
        cuda: device, context and stream.
        provider: see `cuda_provider`.
        threads: of operators that only the CPU has; None is one per core.

    Raises:
        DeviceError: the provider did not start.
        BundleError: a graph does not load, or its inputs are not the contract's.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, provider: Provider, threads: int | None) -> None:
        ort = load_onnxruntime()

        self._bundle, self._cuda = bundle, cuda
        manifest = bundle.manifest
        self._rows_dtype = contract.compute_dtype(manifest.vision, manifest.dialect)
        self._place = Place(cuda, provider.device)
        self._kernels = selection_kernels(cuda)
        # The host waits for results by itself, once, after queueing their copy.
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with cuda.active():
            self._vision, self._language = open_graphs(bundle, provider, threads)
            self.description = f"onnxruntime {ort.__version__}, {provider.name}, {cuda.name}"
        self._vision_binding = self._vision.io_binding()

    @property
    def numerics(self) -> str:
        return self.description

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

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)`, on the device or not, -> `(tiles, tokens_per_tile, hidden)`."""
        vision, language = self._bundle.spec.vision, self._bundle.spec.language
        shape = (len(tiles), vision.tokens_per_tile, language.hidden_size)
        with self._cuda.active():
            held = tiles if isinstance(tiles, DeviceArray) else self._uploaded(tiles)
            rows = self._cuda.empty(shape, self._rows_dtype)
            self._place.bind_input(self._vision_binding, contract.TILES, held)
            self._place.bind_output(self._vision_binding, contract.IMAGE_EMBEDDINGS, rows)
            self.run(self._vision, self._vision_binding)
            host = np.empty(shape, self._rows_dtype)
            self._cuda.download(rows, host)
            self._cuda.synchronize()
        return host

    def new_cache(self, capacity: int) -> CudaCache:
        """Allocate keys, values and the rotary tables; nothing is allocated while decoding."""
        try:
            with self._cuda.active():
                binding = self._language.io_binding()
                given = (self._bundle, capacity, self._kernels)
                return CudaCache(self._place, binding, *given)
        except DeviceError as error:
            raise CapacityError(
                f"no device memory for a KV cache of {capacity} tokens ({reason(error)})",
                remedies=[Remedy.LOWER_CONTEXT],
            ) from error

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run one pass over new rows; see `Backend.forward`."""
        new = single(batch)
        cache = new.cache
        assert isinstance(cache, CudaCache)
        with self._cuda.active():
            cache.feed(new)
            self.run(self._language, cache.binding)
            return cache.logits.read()

    def forward_candidates(self, batch: Sequence[Slice], count: int) -> list[Candidates]:
        """Run one pass over one new row; see `SelectingBackend.forward_candidates`."""
        new = single(batch)
        cache = new.cache
        assert isinstance(cache, CudaCache)
        with self._cuda.active():
            cache.feed(new)
            self.run(self._language, cache.binding)
            return [cache.logits.candidates(count)]

    def run(self, session: Any, binding: Any) -> None:
        """Queue a session behind what is on the stream."""
        session.run_with_iobinding(binding, self._options)

    def _uploaded(self, tiles: NDArray[np.uint8]) -> DeviceArray:
        device = self._cuda.empty(tiles.shape, np.uint8)
        self._cuda.upload(np.ascontiguousarray(tiles), device)
        return device


def _described(array: DeviceArray) -> tuple[type, tuple[int, ...], int]:
    """Element type, shape and address, as ONNX Runtime's bindings take them."""
    return array.dtype.type, array.shape, array.address
