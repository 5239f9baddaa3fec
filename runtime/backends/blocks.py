"""Products of weights in blocks by our own kernel, where it can be had and is exact.

It reads weights as the bundle stores them, for ONNX Runtime's MatMulNBits: they are mapped and
never copied, by any version of ONNX Runtime, and where the kernel cannot be had, MatMulNBits runs
the same file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from internvl_edge.bundle.contract import LANGUAGE_GRAPH
from internvl_edge.bundle.files import read_bytes
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.kernels.blocks.library import BlockLibrary
from internvl_edge.kernels.build import BuildError, operator_library
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_nodes import give_products
from internvl_edge.runtime.backends.products import Product, gives_integers, probe_file

#: Products of weights in blocks, by which the kernel is tried.
PROBES: tuple[Product, ...] = ("int4", "int8")
#: A graph without its weights.
GRAPH_BYTES = 1 << 30
#: Where a graph that is given as bytes finds its weights.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class BlockKernel:
    """The kernel that multiplies weights in blocks, of 4 and 8 bits, on this machine.

    Attributes:
        library: of ONNX Runtime operators; None where there is none.
        name: the instructions it uses, or why there is none.
    """

    library: Path | None
    name: str

    def __str__(self) -> str:
        return self.name if self.library else f"onnxruntime's MatMulNBits: {self.name}"

    def give(self, graph: Path, options: Any) -> str | bytes:
        """Let the kernel compute what it can of a graph.

        Args:
            graph: an ONNX file.
            options: `onnxruntime.SessionOptions`, which get the library.

        Returns:
            What to open with these options: the graph, changed, or its path.

        Raises:
            OSError: it cannot be read.
        """
        return give_nodes(graph, options, self.library, give_products)


def give_nodes(
    graph: Path, options: Any, library: Path | None, give: Callable[[bytes], bytes | None]
) -> str | bytes:
    """Let operators of ours compute what `give` gives them of a graph; see `BlockKernel.give`.

    Args:
        library: of them; None where there is none.
        give: changes a model, or returns None where nothing is theirs.

    Raises:
        OSError: the graph cannot be read.
    """
    changed = give(read_bytes(graph, GRAPH_BYTES)) if library else None
    if changed is None:
        return str(graph)
    options.register_custom_ops_library(str(library))
    options.add_session_config_entry(WEIGHTS_FOLDER, str(graph.parent))
    return changed


NO_KERNEL = BlockKernel(None, "not used")


def bundle_kernel(bundle: Bundle) -> BlockKernel:
    """Return the kernel that computes a bundle's language graph on the CPU."""
    manifest = bundle.manifest
    if manifest.dialect != "onnxruntime" or manifest.language not in PROBES:
        return NO_KERNEL
    kernel = block_kernel()
    try:
        graph = read_bytes(bundle.file(LANGUAGE_GRAPH), GRAPH_BYTES)
    except OSError:  # said when it is opened
        return NO_KERNEL
    if kernel.library is not None and give_products(graph) is None:
        return BlockKernel(None, "the bundle has zero points, or blocks of another size")
    return kernel


@functools.cache
def block_kernel() -> BlockKernel:
    """Return the kernel of this machine: built on first use, and tried before it is trusted."""
    try:
        library = operator_library()
        fastest = BlockLibrary(library).paths[0]
    except (BuildError, OSError) as error:
        return BlockKernel(None, f"no library ({str(error).splitlines()[0]})")
    if fastest == "plain":
        return BlockKernel(None, "this CPU has no instructions for it")
    kernel = BlockKernel(library, fastest)
    if not all(gives_integers(partial(_open_probe, kernel, probe), probe) for probe in PROBES):
        version = load_onnxruntime().__version__
        return BlockKernel(None, f"onnxruntime {version} does not run it, or not exactly")
    return kernel


def _open_probe(kernel: BlockKernel, probe: Product) -> Any:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    model = kernel.give(probe_file(probe), options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
