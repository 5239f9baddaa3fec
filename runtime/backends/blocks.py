"""Products of weights in blocks by our own kernel, where it can be had and is exact.

It reads weights as the bundle stores them, for ONNX Runtime's MatMulNBits and QMoE: they are mapped
and never copied, by any version of ONNX Runtime, and where the kernel cannot be had, these run the
same file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import LANGUAGE_GRAPH
from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.runtime.backends.own_kernel import (
    GRAPH_BYTES,
    KernelKind,
    OwnKernel,
    own_kernel,
)
from internvl_edge.runtime.backends.own_nodes import give_products
from internvl_edge.runtime.backends.products import (
    Product,
    gives_integers,
    probe_file,
    probe_input,
)

#: Products of weights in blocks, by which the kernel is tried.
PROBES: tuple[Product, ...] = ("int4", "int8")
#: The graph of experts by which it is tried, which also gives what it should give; with one row,
#: and with more.
EXPERTS_PROBE = Path(__file__).with_name("probes") / "experts.onnx"
EXPERTS_ROWS = 9
#: Of what is right: inputs are rounded to 127 steps, twice.
_ROUNDING = 0.05


def _is_right(kernel: OwnKernel) -> bool:
    exact = (
        gives_integers(partial(kernel.open_probe, probe_file(probe)), probe) for probe in PROBES
    )
    return all(exact) and _mixes_experts(kernel)


def _mixes_experts(kernel: OwnKernel) -> bool:
    session, x = kernel.open_probe(EXPERTS_PROBE), experts_input()
    for rows in (1, EXPERTS_ROWS):
        got, wanted = session.run(None, {"x": x[:rows]})
        if not np.linalg.norm(got - wanted[:rows]) < _ROUNDING * np.linalg.norm(wanted[:rows]):
            return False
    return True


def experts_input() -> NDArray[np.float32]:
    """Return rows `(EXPERTS_ROWS, WIDTH)` for the probe of experts, from -1 to 1."""
    return probe_input(EXPERTS_ROWS).astype(np.float32) / np.float32(128)


BLOCKS = KernelKind(
    room="blocks",
    instead="onnxruntime's MatMulNBits and QMoE",
    give=give_products,
    is_right=_is_right,
    probes=(*map(probe_file, PROBES), EXPERTS_PROBE),
)
NO_KERNEL = OwnKernel(BLOCKS, None, "not used")


def bundle_kernel(bundle: Bundle) -> OwnKernel:
    """Return the kernel that computes a bundle's language graph on the CPU."""
    manifest = bundle.manifest
    if manifest.dialect != "onnxruntime" or manifest.language not in PROBES:
        return NO_KERNEL
    kernel = own_kernel(BLOCKS)
    try:
        graph = read_bytes(bundle.file(LANGUAGE_GRAPH), GRAPH_BYTES)
    except OSError:  # said when it is opened
        return NO_KERNEL
    if kernel.library is not None and give_products(graph) is None:
        why = "the bundle has zero points, blocks of another size or other experts"
        return OwnKernel(BLOCKS, None, why)
    return kernel
