"""`internvl-edge prepare`: pack a bundle's weights for this machine, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from internvl_edge.bundle.errors import OutputError, PrepareError
from internvl_edge.bundle.manifest import Bundle, file_entry, open_bundle
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.graphs.graph import Progress
from internvl_edge.export.output.destination import check_target
from internvl_edge.export.output.ownership import remove_own
from internvl_edge.export.output.work import NEW, check_space, say_kept, work_folder
from internvl_edge.export.prepare.check import check_prepared, computed, some_pass
from internvl_edge.export.prepare.prepack import packed_bytes, prepack_graph
from internvl_edge.export.writer import ignore_total
from internvl_edge.runtime.backends.own_kernels import left_products, mapped_graphs
from internvl_edge.runtime.backends.prepared import (
    MANIFEST,
    packed_graphs,
    prepared_folder,
    prepared_manifest,
    superseded,
)
from internvl_edge.runtime.backends.products import Form, bundle_form
from internvl_edge.runtime.backends.sessions import check_path
from internvl_edge.runtime.memory import MemoryGuard

ALL_MAPPED = (
    "on this machine all weights of the bundle are mapped as they are, by kernels of ours:"
    " there is nothing to prepare"
)


def all_mapped(path: str | Path) -> bool:
    """Whether every weight of a bundle is mapped as it is, which is what preparing is for.

    Raises:
        BundleError: not a bundle, or a damaged one.
    """
    return not packed_graphs(open_bundle(path, verify="size"))


def prepare_bundle(
    path: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> Path:
    """Write the graphs of a bundle with their matrices packed for this CPU.

    Loading then maps the weights instead of copying them; a graph whose weights our own kernels
    map as they are is left. Writing takes as much memory as opening the larger graph alone.

    Args:
        path: a bundle of the onnxruntime dialect.
        overwrite: replace what an earlier run wrote.
        progress: called with the total of bytes; returns a function called with each increment.

    Returns:
        The directory written, inside the bundle.

    Raises:
        BundleError: not a bundle, or a damaged one.
        DeviceError: integer products are wrong on this machine.
        BusyError: another process prepares it.
        OutputError: it exists already, or the bundle cannot be written to.
        CapacityError: no space, or the packed weights of one graph do not fit into memory.
        PrepareError: a graph is float16, all are mapped as they are, or ONNX Runtime does not load
            what it packed.
    """
    bundle = open_bundle(path)
    for part in ("vision", "language"):
        if getattr(bundle.manifest, part) == "fp16":
            raise PrepareError(
                f"the {part} graph is fp16, which the CPU holds in memory as float32: there is"
                f" nothing to map; export with --{part} int8"
            )
    target = prepared_folder(bundle)
    check_path(target)
    _check_target(target, overwrite)
    packed = packed_graphs(bundle)
    if not packed:
        raise PrepareError(ALL_MAPPED)
    mapped = mapped_graphs(bundle)
    form = bundle_form(bundle.manifest, left_products(bundle.manifest, mapped))
    if not form.packs:
        raise PrepareError(
            "on this machine integer products are exact only with weights that are not packed:"
            " there is nothing to prepare"
        )
    sizes = {
        graph: sum(bundle.manifest.files[name].bytes for name in names)
        for graph, names in packed.items()
    }
    total = sum(sizes.values())
    check_space(target, packed_bytes(total))
    MemoryGuard(bundle.manifest, False, low_memory=True, mapped=mapped).check_prepare()
    advance = (progress or ignore_total)(total)
    with work_folder(target) as work:
        _check_target(target, overwrite)  # another process may have been here meanwhile
        aside = work.fresh(NEW)
        for graph, size in sizes.items():
            _prepare_graph(bundle, graph, aside, form)
            advance(size)
        files = {file.name: file_entry(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(prepared_manifest(bundle, files) + "\n", encoding="utf-8")
        work.publish(aside)
        for stale in superseded(target):
            say_kept(stale, remove_own(stale))
    return target


def _prepare_graph(bundle: Bundle, graph: str, aside: Path, form: Form) -> None:
    """Write one graph packed, and compare what it computes; both are never held at once."""
    feeds = some_pass(bundle.manifest, graph)
    session = prepack_graph(bundle.file(graph), aside / graph, form)
    wanted = computed(session, graph, feeds)
    del session
    check_prepared(aside, graph, feeds, wanted)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise OutputError(f"{named(target)} exists", [Remedy.OVERWRITE])
    check_target(target, overwrite)
