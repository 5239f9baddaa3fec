"""The operations of an INT8 vision tower by kernels of ours, where they are to be had.

ONNX Runtime's float operations differ in their last bit between kinds of CPU, and in a quantised
tower such a bit decides now and then to which integer an activation rounds. Ours give the same bits
everywhere, so that a bundle's embeddings are the same on every CPU. Integer products are exact by
either; ours map weights as they are stored, where ONNX Runtime packs a copy of all of them. Where
the kernels cannot be had, the graph runs as it is stored.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import VISION_GRAPH
from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.manifest import Bundle, Manifest
from internvl_edge.kernels.vision.library import VisionLibrary
from internvl_edge.runtime.backends.own_kernel import (
    GRAPH_BYTES,
    KernelKind,
    OwnKernel,
    built_library,
    own_kernel,
)
from internvl_edge.runtime.backends.products import exact_form
from internvl_edge.runtime.backends.products import probe_file as product_probe
from internvl_edge.runtime.backends.tower_nodes import give_tower, takes_all_products

#: Shape of the probe's input, float32: tiles, tokens and width.
PROBE_SHAPE = (2, 37, 48)
PROBE_INPUT, PROBE_WANTED = "x", "wanted"


def bundle_tower(manifest: Manifest) -> OwnKernel:
    """Return what computes the operations of a bundle's vision graph on the CPU."""
    if manifest.traits.engines or manifest.vision != "int8":
        return NO_TOWER
    return tower_kernel()


def tower_kernel() -> OwnKernel:
    """Return the kernel of this machine: with products where they are as fast as ONNX Runtime's."""
    library = built_library()
    with contextlib.suppress(AttributeError, OSError):  # said by `own_kernel`
        if isinstance(library, Path) and not VisionLibrary(library).multiplies_fast:
            return own_kernel(FLOAT_TOWER)
    return own_kernel(TOWER)


def maps_tower(bundle: Bundle) -> bool:
    """Whether all integer products of a bundle's vision graph are our kernel's on the CPU: weights
    are then mapped as they are."""
    kernel = bundle_tower(bundle.manifest)
    if kernel.library is None or kernel.kind != TOWER:
        return False
    try:
        return takes_all_products(read_bytes(bundle.file(VISION_GRAPH), GRAPH_BYTES))
    except OSError:  # said when it is opened
        return False


def gives_known_bits(kernel: OwnKernel) -> bool:
    """Return whether a layer of every operation gives, bit for bit, what is stored beside it."""
    entries = {} if kernel.kind == TOWER else exact_form(("w8a8",)).entries
    session = kernel.open_probe(probe_file(), entries)
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
#: Where ONNX Runtime's integer products are faster.
FLOAT_TOWER = replace(
    TOWER, give=partial(give_tower, products=False), left=", products by onnxruntime's QGemm"
)
NO_TOWER = OwnKernel(TOWER, None, "not used")
