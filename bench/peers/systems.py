"""Which systems stand beside this runtime, what each needs, and the files it reads."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.bench.peers.gguf_writer import write_gguf
from internvl_edge.bench.peers.llama_checkpoint import write_llama
from internvl_edge.bench.peers.llamacpp import quantize_gguf
from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import language_shapes
from internvl_edge.export.output.work import check_space
from internvl_edge.runtime.free_memory import available_memory


@dataclass(frozen=True)
class Peer:
    """A system at one precision.

    Attributes:
        engine: its name among `engines.ENGINES`.
        packages: distributions that must be installed; their versions are recorded.
        install: what brings them.
        gguf: llama.cpp's file type; None reads a Llama checkpoint.
        weight_bytes: memory that loading takes, per parameter of the language part.
    """

    name: str
    engine: str
    packages: tuple[str, ...]
    install: str
    gguf: str | None
    weight_bytes: float


_GGUF = ("llama-cpp-python", "gguf")
_TORCH = ("torch", "transformers")
_PEERS = "pip install 'internvl-edge[peers]'"
_TRAIN = "pip install 'internvl-edge[train]'"
_OPTIMUM = (
    "pip install optimum-onnx 'internvl-edge[export]' in an environment of its own (it needs"
    " transformers < 4.58) and pass its interpreter as --optimum-python"
)
PEERS = (
    Peer("llama.cpp Q4_0", "llama.cpp", _GGUF, _PEERS, "Q4_0", 0.6),
    Peer("llama.cpp Q4_K_M", "llama.cpp", _GGUF, _PEERS, "Q4_K_M", 0.7),
    Peer("llama.cpp Q8_0", "llama.cpp", _GGUF, _PEERS, "Q8_0", 1.1),
    Peer("transformers bf16", "transformers", _TORCH, _TRAIN, None, 2.2),
    Peer("transformers bf16, compiled", "transformers-compiled", _TORCH, _TRAIN, None, 2.2),
    # Its exporter holds the float32 model and the graph made of it.
    Peer("Optimum fp32", "optimum", ("optimum-onnx", "onnxruntime"), _OPTIMUM, None, 10.0),
)


def choose_peers(names: Sequence[str]) -> list[Peer]:
    """Those with one of `names`, or whose name begins so, in any case; all of them without.

    Raises:
        UsageError: a name fits none.
    """
    chosen: list[Peer] = []
    for name in (name.lower() for name in names):
        exact = [peer for peer in PEERS if peer.name.lower() == name]
        fits = exact or [peer for peer in PEERS if peer.name.lower().startswith(name)]
        if not fits:
            known = ", ".join(repr(peer.name) for peer in PEERS)
            raise UsageError(f"--peer {quoted(name)} is unknown; known: {known}")
        chosen += [peer for peer in fits if peer not in chosen]
    return chosen or list(PEERS)


def obstacle(peer: Peer, spec: ModelSpec, installed: Mapping[str, str]) -> str | None:
    """Why a peer cannot be measured here; None where it can."""
    if absent := [package for package in peer.packages if package not in installed]:
        return f"{', '.join(absent)} not installed: {peer.install}"
    needed, there = int(peer.weight_bytes * language_parameters(spec)), available_memory()
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
    """Converted weights in a folder: float forms are kept, of the quantised only the last.

    Args:
        source: whose language part is converted.
        folder: an existing one.
    """

    def __init__(self, source: WeightSource, folder: Path, threads: int) -> None:
        self._source = source
        self._folder = folder
        self._threads = threads
        self._quantised: Path | None = None

    def path(self, peer: Peer) -> Path:
        """The file or directory a peer loads; written when it is first asked for.

        Raises:
            ExportError: no space, or weights that float16 is too small for.
            BundleError: llama.cpp's quantiser failed.
        """
        if self._quantised is not None:
            self._quantised.unlink(missing_ok=True)
        checkpoint, gguf = self._folder / "llama", self._folder / "float16.gguf"
        size = 2 * language_parameters(self._source.spec)
        if peer.gguf is None:
            gguf.unlink(missing_ok=True)
            if not checkpoint.exists():
                check_space(checkpoint, size)
                write_llama(self._source, checkpoint)
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
        if not gguf.exists():
            check_space(gguf, 2 * size)
            write_gguf(self._source, gguf)
        self._quantised = self._folder / f"{peer.gguf}.gguf"
        return quantize_gguf(gguf, self._quantised, peer.gguf, self._threads)


def interpreter(peer: Peer, optimum_python: Path | None) -> str:
    """The Python that a peer's worker runs in."""
    if peer.engine == "optimum" and optimum_python is not None:
        return str(optimum_python)
    return sys.executable
