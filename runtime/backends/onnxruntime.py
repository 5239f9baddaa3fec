"""ONNX Runtime on the CPU (the embedded default) or through its CUDA provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime import contract
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.bundle import Bundle
from internvl_edge.runtime.errors import BundleError, DeviceError, LimitError
from internvl_edge.runtime.kv_cache import CacheState
from internvl_edge.runtime.rope import RopeTable

if TYPE_CHECKING:
    import onnxruntime as ort

Device = Literal["cpu", "cuda"]

_ORT_TYPE = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
}
_PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass
class OrtCache:
    """Keys and values on the device, bound once as input and as output of the same address."""

    state: CacheState
    rope: RopeTable
    binding: Any  # onnxruntime.IOBinding
    storage: list[Any]  # onnxruntime.OrtValue; kept alive while bound


class OnnxRuntimeBackend:
    """Runs vision.onnx and language.onnx with ONNX Runtime.

    Args:
        bundle: a verified bundle of the onnxruntime dialect.
        device: "cpu" or "cuda".
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).

    Raises:
        DeviceError: the provider is not in this installation, or fell back to another one.
        BundleError: a graph does not load, or its inputs are not the contract's.
    """

    def __init__(self, bundle: Bundle, device: Device, threads: int | None) -> None:
        import onnxruntime as ort

        if _PROVIDER[device] not in ort.get_available_providers():
            raise DeviceError(
                f"device {device!r} needs {_PROVIDER[device]}, this onnxruntime {ort.__version__}"
                f" has {ort.get_available_providers()}; install internvl-edge[gpu] or use"
                " device='cpu'"
            )
        self._spec = bundle.spec
        self._device = device
        self._dtype = contract.COMPUTE_DTYPE[bundle.manifest.language]
        self._cache_dtype = contract.CACHE_DTYPE[bundle.manifest.kv]
        self._threads = threads
        self._ort_value = ort.OrtValue
        self._version = ort.__version__
        self._vision = self._session(bundle, contract.VISION_GRAPH)
        self._language = self._session(bundle, contract.LANGUAGE_GRAPH)
        _check_contract(
            self._language,
            contract.language_inputs(
                self._spec.language, bundle.manifest.language, bundle.manifest.kv
            ),
            contract.language_outputs(self._spec.language, bundle.manifest.kv),
        )
        _check_contract(
            self._vision,
            contract.vision_inputs(self._spec.vision),
            contract.vision_outputs(self._spec.vision, self._spec.language, bundle.manifest.vision),
        )

    @property
    def description(self) -> str:
        threads = self._threads or "all"
        return f"onnxruntime {self._version}, {_PROVIDER[self._device]}, {threads} threads"

    def encode_tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> `(tiles, tokens_per_tile, hidden)`."""
        outputs = self._vision.run([contract.IMAGE_EMBEDDINGS], {contract.TILES: tiles})
        return np.asarray(outputs[0])

    def new_cache(self, capacity: int) -> OrtCache:
        """Allocate `2 * layers` buffers. On the CPU, pages are committed when first written."""
        try:
            return self._allocate(capacity)
        except MemoryError as error:
            raise LimitError(
                f"no memory for a KV cache of {capacity} tokens; use a smaller max_context"
            ) from error

    def _allocate(self, capacity: int) -> OrtCache:
        language = self._spec.language
        shape = contract.cache_shape(language, capacity)
        binding = self._language.io_binding()
        storage = []
        for layer in range(language.num_hidden_layers):
            for past, present in (
                (contract.past_key(layer), contract.present_key(layer)),
                (contract.past_value(layer), contract.present_value(layer)),
            ):
                buffer = self._ort_value.ortvalue_from_numpy(
                    np.zeros(shape, self._cache_dtype), self._device, 0
                )
                binding.bind_ortvalue_input(past, buffer)
                binding.bind_ortvalue_output(present, buffer)
                storage.append(buffer)
        rope = RopeTable(language, capacity, self._dtype)
        return OrtCache(CacheState(capacity), rope, binding, storage)

    def forward(
        self,
        cache: Cache,
        embeddings: NDArray[np.floating],
        base: float,
        logit_rows: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """One pass over new rows; see `Backend.forward`."""
        assert isinstance(cache, OrtCache)
        start = cache.state.length
        total = start + len(embeddings)
        cache.rope.prepare(start, total, base)
        binding = cache.binding
        binding.bind_cpu_input(contract.EMBEDDINGS, np.ascontiguousarray(embeddings))
        binding.bind_cpu_input(contract.ROPE_COS, cache.rope.cos)
        binding.bind_cpu_input(contract.ROPE_SIN, cache.rope.sin)
        binding.bind_cpu_input(contract.LAST_POSITION, np.array([total - 1], np.int32))
        binding.bind_cpu_input(contract.TOTAL_LENGTH, np.array(total, np.int32))
        binding.bind_cpu_input(contract.LOGIT_ROWS, logit_rows)
        logits = np.empty((len(logit_rows), self._spec.language.vocab_size), np.float32)
        binding.bind_ortvalue_output(contract.LOGITS, self._ort_value.ortvalue_from_numpy(logits))
        self._language.run_with_iobinding(binding)
        return logits

    def _session(self, bundle: Bundle, graph: str) -> ort.InferenceSession:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        provider = _PROVIDER[self._device]
        try:
            session = ort.InferenceSession(
                str(bundle.file(graph)),
                options,
                providers=list(dict.fromkeys([provider, _PROVIDER["cpu"]])),
            )
        except Exception as error:
            raise BundleError(f"{bundle.file(graph)} does not load: {error}") from error
        if session.get_providers()[0] != provider:
            raise DeviceError(
                f"{provider} is installed but did not start (got {session.get_providers()});"
                " check the driver and CUDA libraries, or use device='cpu'"
            )
        return session


def _check_contract(
    session: ort.InferenceSession, inputs: list[contract.Tensor], outputs: list[contract.Tensor]
) -> None:
    """Raise BundleError unless names, types and fixed dimensions are the contract's."""
    for nodes, tensors in ((session.get_inputs(), inputs), (session.get_outputs(), outputs)):
        try:
            got = {(node.name, node.type, _fixed(node.shape)) for node in nodes}
        except UnicodeDecodeError as error:
            raise BundleError(f"a graph has a damaged name: {error}; export it anew") from error
        wanted = {(t.name, _ORT_TYPE[t.dtype], _fixed(t.shape)) for t in tensors}
        if got != wanted:
            raise BundleError(
                f"graph and manifest do not match: graph {sorted(got - wanted, key=str)[:2]},"
                f" manifest {sorted(wanted - got, key=str)[:2]}; export the checkpoint with this"
                " version of internvl-edge"
            )


def _fixed(shape: Sequence[int | str]) -> tuple[int | None, ...]:
    """A shape with None for the symbolic dimensions."""
    return tuple(dim if isinstance(dim, int) else None for dim in shape)
