"""Products of weights in blocks by our own kernel, where it can be had and is exact.

It reads weights as the bundle stores them, for ONNX Runtime's MatMulNBits: they are mapped and
never copied, by any version of ONNX Runtime, and where the kernel cannot be had, MatMulNBits runs
the same file.
"""

from __future__ import annotations

from functools import partial

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
from internvl_edge.runtime.backends.products import Product, gives_integers, probe_file

#: Products of weights in blocks, by which the kernel is tried.
PROBES: tuple[Product, ...] = ("int4", "int8")


def _is_right(kernel: OwnKernel) -> bool:
    return all(
        gives_integers(partial(kernel.open_probe, probe_file(probe)), probe) for probe in PROBES
    )


BLOCKS = KernelKind(
    room="blocks",
    instead="onnxruntime's MatMulNBits",
    give=give_products,
    is_right=_is_right,
    probes=tuple(map(probe_file, PROBES)),
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
        return OwnKernel(BLOCKS, None, "the bundle has zero points, or blocks of another size")
    return kernel
