"""llama.cpp's rows of the tiny_ocr table: its quantisers on the same language weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from internvl_edge.bench.peers.backend import load_with_llamacpp
from internvl_edge.bench.peers.gguf_writer import write_gguf
from internvl_edge.bench.peers.llamacpp import quantize_gguf
from internvl_edge.bundle.manifest import read_manifest
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime import InternVL

KINDS = ("Q8_0", "Q4_K_M", "Q4_0")
NAMES = {f"fp32 + llama.cpp {kind}": kind for kind in KINDS}


@dataclass(frozen=True)
class Loaded:
    """A model to ask, and the bytes its weights take on disk, vision included."""

    name: str
    nbytes: int
    model: InternVL


def absent() -> str | None:
    """What is missing for these rows, or None."""
    missing = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not installed: pip install 'internvl-edge[peers]'"


def llamacpp_models(
    checkpoint: Path, folder: Path, names: list[str], threads: int | None
) -> Iterator[Loaded]:
    """Float vision with each quantised language part, one at a time.

    Args:
        folder: for the converted files.
        names: some of `NAMES`.
    """
    count = threads or available_cores()
    source = Checkpoint(checkpoint)
    bundle = export_bundle(checkpoint, folder / "llama.cpp")
    files = read_manifest(bundle).files
    vision = sum(entry.bytes for name, entry in files.items() if name.startswith("vision"))
    gguf = write_gguf(source, folder / "float16.gguf")
    for name in names:
        path = quantize_gguf(gguf, folder / f"{NAMES[name]}.gguf", NAMES[name], count)
        size = vision + path.stat().st_size
        context = source.spec.language.max_position_embeddings
        yield Loaded(name, size, load_with_llamacpp(bundle, path, count, context))
