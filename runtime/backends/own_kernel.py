"""A kernel of ours in the place of ONNX Runtime's: built on first use, tried before it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bundle.files import read_bytes
from internvl_edge.kernels.build import SOURCES, BuildError, operator_library
from internvl_edge.kernels.operators.library import OperatorLibrary
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_nodes import has_own_nodes
from internvl_edge.runtime.backends.trials import open_probe, probe_options, succeeds
from internvl_edge.runtime.backends.weight_files import give_weights

#: A graph without its weights.
GRAPH_BYTES = 1 << 30


@dataclass(frozen=True)
class KernelKind:
    """What one of our kernels is.

    Attributes:
        room: the folder of its sources, below `kernels`; also its name in the library.
        instead: what computes where it is not used.
        give: gives it what it can compute of a serialised `ModelProto`; None where that is nothing.
        is_right: runs the probes on it; any exception is a no.
        probes: files of the graphs it is tried by.
        verdict: how it should run.
        on_any_cpu: whether it is used where the CPU has no instructions for it.
        left: what ONNX Runtime computes all the same, as it is said after the kernel's name.
    """

    room: str
    instead: str
    give: Callable[[bytes], bytes | None]
    is_right: Callable[[OwnKernel], bool]
    probes: tuple[Path, ...]
    verdict: str = "exactly"
    on_any_cpu: bool = False
    left: str = ""


@dataclass(frozen=True)
class OwnKernel:
    """A kernel of ours on this machine.

    Attributes:
        library: of ONNX Runtime operators; None where there is none.
        name: the instructions it uses, or why there is none.
    """

    kind: KernelKind
    library: Path | None
    name: str

    def __str__(self) -> str:
        if self.library is None:
            return f"{self.kind.instead}: {self.name}"
        return f"{self.name}{self.kind.left}"

    def give(self, graph: Path, options: Any) -> str | bytes:
        """Let the kernel compute what it can of a graph; see `give_nodes`."""
        return give_nodes(graph, options, self)

    def open_probe(self, graph: Path, entries: Mapping[str, str] | None = None) -> Any:
        """Open a graph as `onnxruntime.InferenceSession`, its nodes given to the kernel.

        Args:
            entries: of the session's configuration.
        """
        options = probe_options(entries or {})
        return open_probe(self.give(graph, options), options)


def give_nodes(graph: Path, options: Any, *kernels: OwnKernel) -> str | bytes:
    """Let kernels compute what they can of a graph.

    Args:
        graph: an ONNX file.
        options: `onnxruntime.SessionOptions`, which get the library.
        kernels: those without a library are passed over.

    Returns:
        What to open with these options: the graph, changed, or its path.

    Raises:
        OSError: it cannot be read.
    """
    used = [kernel for kernel in kernels if kernel.library is not None]
    if not used:
        return str(graph)
    model = given = read_bytes(graph, GRAPH_BYTES)
    if has_own_nodes(model):
        return str(graph)  # ONNX Runtime says that it does not know them
    for kernel in used:
        given = kernel.kind.give(given) or given
    if given is model:
        return str(graph)
    options.register_custom_ops_library(str(used[0].library))
    return give_weights(given, graph, options)


@functools.cache
def built_library() -> Path | str:
    """Return the library of all kernels, or why there is none: looked for, or compiled, once."""
    try:
        return operator_library()
    except BuildError as error:
        return str(error).splitlines()[0]


@functools.cache
def own_kernel(kind: KernelKind) -> OwnKernel:
    """Return the kernel of this machine; one without library where it cannot be had or is wrong."""
    library = built_library()
    if isinstance(library, str):
        return OwnKernel(kind, None, f"no library ({library})")
    try:
        fastest = OperatorLibrary(library, kind.room).paths[0]
    except (AttributeError, OSError) as error:
        return OwnKernel(kind, None, f"no library ({str(error).splitlines()[0]})")
    if fastest == "plain" and not kind.on_any_cpu:
        return OwnKernel(kind, None, "this CPU has no instructions for it")
    kernel = OwnKernel(kind, library, fastest)
    if succeeds(f"{kind.room} {fastest}", _inputs(library, kind), lambda: _is_right(kernel)):
        return kernel
    version = load_onnxruntime().__version__
    return OwnKernel(kind, None, f"onnxruntime {version} does not run it, or not {kind.verdict}")


def _inputs(library: Path, kind: KernelKind) -> Iterator[bytes]:
    """Return what a trial depends on beside what all do.

    Raises:
        OSError: a file cannot be read.
    """
    for probe in map(Path.read_bytes, kind.probes):
        yield kind.give(probe) or probe
    yield from map(Path.read_bytes, [library, *sorted((SOURCES / kind.room).glob("*.py"))])


def _is_right(kernel: OwnKernel) -> bool:
    try:
        return kernel.kind.is_right(kernel)
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no common class
        return False
