"""What computes parts of a graph in the place of ONNX Runtime: one library of our operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH, Tensor
from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.manifest import Bundle, Manifest
from internvl_edge.runtime.backends.attention import ATTENTION, NO_ATTENTION
from internvl_edge.runtime.backends.attention_nodes import give_attention, has_caches
from internvl_edge.runtime.backends.blocks import NO_KERNEL, bundle_kernel
from internvl_edge.runtime.backends.own_kernel import (
    GRAPH_BYTES,
    OwnKernel,
    give_nodes,
    own_kernel,
)
from internvl_edge.runtime.backends.products import Product, products_of
from internvl_edge.runtime.backends.tower import NO_TOWER, bundle_tower, maps_tower


@dataclass(frozen=True)
class OwnKernels:
    """Kernels of a language graph's products of weights in blocks and of its attention, or of the
    operations of a vision graph; none by default.

    Attributes:
        maps: whether they map the graph's matrices as they are stored.
    """

    blocks: OwnKernel = NO_KERNEL
    attention: OwnKernel = NO_ATTENTION
    tower: OwnKernel = NO_TOWER
    maps: bool = False

    @property
    def library(self) -> Path | None:
        """The library of operators; None where none is used."""
        return self.blocks.library or self.attention.library or self.tower.library

    def give(self, graph: Path, options: Any) -> str | bytes:
        """Let the kernels compute what they can of a graph; see `give_nodes`."""
        return give_nodes(graph, options, self.blocks, self.attention, self.tower)


NO_KERNELS = OwnKernels()


def bundle_kernels(bundle: Bundle) -> OwnKernels:
    """Return the kernels that compute a bundle's language graph on the CPU."""
    blocks = bundle_kernel(bundle)
    return OwnKernels(blocks, bundle_attention(bundle), maps=blocks.library is not None)


def vision_kernels(bundle: Bundle) -> OwnKernels:
    """Return the kernels that compute a bundle's vision graph on the CPU."""
    return OwnKernels(tower=bundle_tower(bundle.manifest), maps=maps_tower(bundle))


def mapped_graphs(bundle: Bundle) -> frozenset[str]:
    """Return the graphs whose matrices are mapped as the bundle stores them, by our kernels."""
    kernels = {VISION_GRAPH: vision_kernels(bundle), LANGUAGE_GRAPH: bundle_kernels(bundle)}
    return frozenset(graph for graph, own in kernels.items() if own.maps)


def left_products(manifest: Manifest, mapped: frozenset[str]) -> tuple[Product, ...]:
    """Return the integer products that may be ONNX Runtime's on the CPU; see `mapped_graphs`."""
    ours = {"w8a8"} if VISION_GRAPH in mapped else set()
    return tuple(one for one in products_of(manifest) if one not in ours)


def bundle_attention(bundle: Bundle) -> OwnKernel:
    """Return the kernel of a bundle's attention on the CPU."""
    if bundle.manifest.dialect != "onnxruntime":
        return NO_ATTENTION
    kernel = own_kernel(ATTENTION)
    try:
        graph = read_bytes(bundle.file(LANGUAGE_GRAPH), GRAPH_BYTES)
    except OSError:  # said when it is opened
        return NO_ATTENTION
    if kernel.library is None:
        return kernel
    if give_attention(graph) is None or not has_caches(graph, _caches(bundle)):
        return OwnKernel(ATTENTION, None, "the bundle's attention is of another kind")
    return kernel


def _caches(bundle: Bundle) -> list[Tensor]:
    """Return the caches that a bundle's language graph takes and gives."""
    spec, manifest = bundle.spec.language, bundle.manifest
    tensors = [
        *contract.language_inputs(spec, manifest.language, manifest.kv, manifest.dialect),
        *contract.language_outputs(spec, manifest.kv, manifest.dialect),
    ]
    names = {name for pair in contract.cache_pairs(spec) for name in pair}
    return [tensor for tensor in tensors if tensor.name in names]
