"""Which systems stand beside this runtime, what each needs, and the files it reads."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl_edge.bench.peers.gguf_writer import write_gguf
from internvl_edge.bench.peers.llama_checkpoint import write_llama
from internvl_edge.bench.peers.llamacpp import quantize_gguf
from internvl_edge.bench.peers.openvino_writer import GROUP, Packing, write_openvino
from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import language_shapes
from internvl_edge.export.output.work import check_space
from internvl_edge.runtime.free_memory import available_memory

#: What a peer reads.
Form = Literal["Q4_0", "Q4_K_M", "Q8_0", "llama", "openvino", "tower", "mtmd", "fp16", "int8"]


@dataclass(frozen=True)
class Peer:
    """A system at one precision.

    Attributes:
        engine: its name among `engines.ENGINES`.
        packages: distributions that must be installed; their versions are recorded.
        install: what brings them.
        form: what it reads: a GGUF of this type, a Llama checkpoint, an OpenVINO model; of a tower,
            transformers' weights, mtmd's files, or the graph of this precision.
        weight_bytes: memory that loading takes, per parameter of the part that is measured.
        call: how it is called, in short.
    """

    name: str
    engine: str
    packages: tuple[str, ...]
    install: str
    form: Form
    weight_bytes: float
    call: str


_GGUF = ("llama-cpp-python", "gguf")
_TORCH = ("torch", "transformers")
_PEERS = "pip install 'internvl-edge[peers]'"
_OPENVINO = "pip install 'internvl-edge[peers-openvino]'"
_TRAIN = "pip install 'internvl-edge[train]'"
_OPTIMUM = (
    "pip install optimum-onnx 'internvl-edge[export]' in an environment of its own (it needs"
    " transformers < 4.58) and pass its interpreter as --optimum-python"
)
_DECODE = "llama_model_quantize, llama_decode with n_threads, n_ubatch 512, n_seq_max"
_STATIC = "torch.compile(forward) over a StaticCache"
PEERS = (
    Peer("llama.cpp Q4_0", "llama.cpp", _GGUF, _PEERS, "Q4_0", 0.6, _DECODE),
    Peer("llama.cpp Q4_K_M", "llama.cpp", _GGUF, _PEERS, "Q4_K_M", 0.7, _DECODE),
    Peer("llama.cpp Q8_0", "llama.cpp", _GGUF, _PEERS, "Q8_0", 1.1, _DECODE),
    Peer(
        "OpenVINO INT4",
        "openvino",
        ("openvino",),
        _OPENVINO,
        "openvino",
        2.0,  # the packed weights, and what the plug-in makes of them
        f"INT4_ASYM in groups of {GROUP}; compile_model(CPU, LATENCY, INFERENCE_NUM_THREADS),"
        " infer, keys and values as states",
    ),
    Peer(
        "transformers bf16",
        "transformers",
        _TORCH,
        _TRAIN,
        "llama",
        2.2,
        "from_pretrained(dtype=bfloat16), forward over a DynamicCache",
    ),
    Peer(
        "transformers bf16, compiled",
        "transformers-compiled",
        _TORCH,
        _TRAIN,
        "llama",
        2.2,
        f"from_pretrained(dtype=bfloat16), {_STATIC}",
    ),
    # Its exporter holds the float32 model and the graph made of it.
    Peer(
        "Optimum fp32",
        "optimum",
        ("optimum-onnx", "onnxruntime"),
        _OPTIMUM,
        "llama",
        10.0,
        "ORTModelForCausalLM.from_pretrained(export=True, use_io_binding=True)",
    ),
)
_COMPILE = "compile_model(CPU, LATENCY, INFERENCE_NUM_THREADS) of a TensorRT bundle's vision.onnx"
TOWER_PEERS = (
    Peer(
        "OpenVINO INT8",
        "openvino tower",
        ("openvino",),
        _OPENVINO,
        "int8",
        8.0,
        f"{_COMPILE}: INT8 between QuantizeLinear and DequantizeLinear",
    ),
    Peer("OpenVINO", "openvino tower", ("openvino",), _OPENVINO, "fp16", 8.0, _COMPILE),
    Peer(
        "llama.cpp f16",
        "llama.cpp tower",
        _GGUF,
        _PEERS,
        "mtmd",
        4.0,
        "mtmd_encode_chunk with n_threads, a tile at a time",
    ),
    Peer(
        "transformers bf16",
        "transformers tower",
        _TORCH,
        _TRAIN,
        "tower",
        6.0,
        "InternVLModel.get_image_features in bfloat16",
    ),
)


def choose_peers(names: Sequence[str], known: Sequence[Peer] = PEERS) -> list[Peer]:
    """Those with one of `names`, or whose name begins so, in any case; all known ones without.

    Raises:
        UsageError: a name fits none.
    """
    chosen: list[Peer] = []
    for name in (name.lower() for name in names):
        exact = [peer for peer in known if peer.name.lower() == name]
        fits = exact or [peer for peer in known if peer.name.lower().startswith(name)]
        if not fits:
            listed = ", ".join(repr(peer.name) for peer in known)
            raise UsageError(f"--peer {quoted(name)} is unknown; known: {listed}")
        chosen += [peer for peer in fits if peer not in chosen]
    return chosen or list(known)


def obstacle(peer: Peer, parameters: int, installed: Mapping[str, str]) -> str | None:
    """Why a peer cannot be measured here on so many parameters; None where it can."""
    if absent := [package for package in peer.packages if package not in installed]:
        return f"{', '.join(absent)} not installed: {peer.install}"
    needed, there = int(peer.weight_bytes * parameters), available_memory()
    if needed > there:
        return (
            f"needs about {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available;"
            " pass fewer --layers"
        )
    return None


def language_parameters(spec: ModelSpec) -> int:
    """Parameters of the decoder, its table and its head."""
    return sum(math.prod(shape) for shape in language_shapes(spec.language).values())


class Files:
    """Converted weights in a folder: float forms are kept, of the packed ones only the last.

    Args:
        source: whose language part is converted.
        folder: an existing one.
        packing: of the OpenVINO model.
    """

    def __init__(self, source: WeightSource, folder: Path, threads: int, packing: Packing) -> None:
        self._source = source
        self._folder = folder
        self._threads = threads
        self._packing = packing
        self._packed: Path | None = None

    def path(self, peer: Peer) -> Path:
        """The file or directory a peer loads; written when it is first asked for.

        Raises:
            ExportError: no space, or weights that float16 is too small for.
            BundleError: llama.cpp's quantiser failed.
        """
        self._forget(self._packed)
        size = 2 * language_parameters(self._source.spec)
        checkpoint, gguf = self._folder / "llama", self._folder / "float16.gguf"
        if peer.form == "llama":
            self._forget(gguf)
            if not checkpoint.exists():
                check_space(checkpoint, size)
                write_llama(self._source, checkpoint)
            return checkpoint
        self._forget(checkpoint)
        self._packed = self._folder / peer.form
        if peer.form == "openvino":
            self._forget(gguf)
            check_space(self._packed, size)
            self._packed.mkdir()
            return write_openvino(self._source, self._packed / "model.xml", self._packing)
        if not gguf.exists():
            check_space(gguf, 2 * size)
            write_gguf(self._source, gguf)
        return quantize_gguf(gguf, self._packed, peer.form, self._threads)

    def _forget(self, path: Path | None) -> None:
        """Remove a form that is not wanted any more."""
        if path is not None and path.is_dir():
            shutil.rmtree(path)
        elif path is not None:
            path.unlink(missing_ok=True)


def interpreter(peer: Peer, optimum_python: Path | None) -> str:
    """The Python that a peer's worker runs in."""
    if peer.engine == "optimum" and optimum_python is not None:
        return str(optimum_python)
    return sys.executable
