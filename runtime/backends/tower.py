"""The float operations of an INT8 vision tower by kernels of ours, where they are to be had.

ONNX Runtime's differ in their last bit between kinds of CPU, and in a quantised tower such a bit
decides now and then to which integer an activation rounds. Ours give the same bits everywhere, so
that a bundle's embeddings are the same on every CPU. Where they cannot be had, the graph runs as it
is stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.manifest import Manifest
from internvl_edge.kernels.build import BuildError, operator_library
from internvl_edge.kernels.vision.library import VisionLibrary
from internvl_edge.runtime.backends.blocks import give_nodes
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import exact_form
from internvl_edge.runtime.backends.tower_nodes import give_tower

#: Shape of the probe's input, float32: tiles, tokens and width.
PROBE_SHAPE = (2, 37, 48)
PROBE_INPUT, PROBE_WANTED = "x", "wanted"


@dataclass(frozen=True)
class TowerKernel:
    """What computes the float operations of an INT8 vision graph on this machine.

    Attributes:
        library: of ONNX Runtime operators; None where there is none.
        name: the instructions it uses, or why there is none.
    """

    library: Path | None
    name: str

    def __str__(self) -> str:
        return self.name if self.library else f"onnxruntime's operators: {self.name}"

    @property
    def numerics(self) -> str:
        """What results depend on beside ONNX Runtime: which operators compute."""
        return "own tower" if self.library else ""

    def give(self, graph: Path, options: Any) -> str | bytes:
        """Let the kernels compute what they can of a vision graph; see `BlockKernel.give`.

        Raises:
            OSError: it cannot be read.
        """
        return give_nodes(graph, options, self.library, give_tower)


NO_TOWER = TowerKernel(None, "not used")


def bundle_tower(manifest: Manifest) -> TowerKernel:
    """Return what computes the float operations of a bundle's vision graph on the CPU."""
    if manifest.traits.engines or manifest.vision != "int8":
        return NO_TOWER
    return tower_kernel()


@functools.cache
def tower_kernel() -> TowerKernel:
    """Return the kernels of this machine: built on first use, and tried before they are trusted."""
    try:
        library = operator_library()
        fastest = VisionLibrary(library).paths[0]
    except (AttributeError, BuildError, OSError) as error:
        return TowerKernel(None, f"no library ({str(error).splitlines()[0]})")
    if fastest == "plain":
        return TowerKernel(None, "this CPU has no instructions for it")
    kernel = TowerKernel(library, fastest)
    if not gives_known_bits(kernel):
        version = load_onnxruntime().__version__
        return TowerKernel(None, f"onnxruntime {version} does not run it, or not exactly")
    return kernel


def gives_known_bits(kernel: TowerKernel) -> bool:
    """Return whether a layer of every operation gives, bit for bit, what is stored beside it."""
    try:
        computed, wanted = _open_probe(kernel).run(None, {PROBE_INPUT: probe_input()})
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no common class: not these
        return False
    return np.array_equal(computed, wanted)


def probe_file() -> Path:
    """Return the graph by which the kernels are tried."""
    return Path(__file__).with_name("probes") / "tower.onnx"


def probe_input() -> NDArray[np.float32]:
    """Return rows `(tiles * tokens, width)` for the probe: quarters from -8 to 8."""
    tiles, tokens, width = PROBE_SHAPE
    index = np.arange(tiles * tokens * width, dtype=np.uint64).reshape(-1, width)
    spread = (index * np.uint64(2654435761) >> np.uint64(16)) % np.uint64(65)
    return (spread.astype(np.float32) - np.float32(32)) / np.float32(4)


def _open_probe(kernel: TowerKernel) -> Any:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in exact_form(("w8a8",)).entries.items():
        options.add_session_config_entry(key, value)
    model = kernel.give(probe_file(), options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
