"""The float operations of an INT8 vision tower by kernels of ours, where they are to be had.

ONNX Runtime's differ in their last bit between kinds of CPU, and in a quantised tower such a bit
decides now and then to which integer an activation rounds. Ours give the same bits everywhere, so
that a bundle's embeddings are the same on every CPU. Where they cannot be had, the graph runs as it
is stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.manifest import Manifest
from internvl_edge.runtime.backends.own_kernel import KernelKind, OwnKernel, own_kernel
from internvl_edge.runtime.backends.products import exact_form
from internvl_edge.runtime.backends.products import probe_file as product_probe
from internvl_edge.runtime.backends.tower_nodes import give_tower

#: Shape of the probe's input, float32: tiles, tokens and width.
PROBE_SHAPE = (2, 37, 48)
PROBE_INPUT, PROBE_WANTED = "x", "wanted"


def bundle_tower(manifest: Manifest) -> OwnKernel:
    """Return what computes the float operations of a bundle's vision graph on the CPU."""
    if manifest.traits.engines or manifest.vision != "int8":
        return NO_TOWER
    return own_kernel(TOWER)


def gives_known_bits(kernel: OwnKernel) -> bool:
    """Return whether a layer of every operation gives, bit for bit, what is stored beside it."""
    session = kernel.open_probe(probe_file(), exact_form(("w8a8",)).entries)
    computed, wanted = session.run(None, {PROBE_INPUT: probe_input()})
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


TOWER = KernelKind(
    room="vision",
    instead="onnxruntime's operators",
    give=give_tower,
    is_right=gives_known_bits,
    probes=(probe_file(), product_probe("w8a8")),
)
NO_TOWER = OwnKernel(TOWER, None, "not used")
