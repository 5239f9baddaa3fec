"""`internvl-edge prepare`: pack a bundle's weights for this machine, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from internvl_edge.bundle.contract import (
    LANGUAGE_FILES,
    LANGUAGE_GRAPH,
    VISION_FILES,
    VISION_GRAPH,
)
from internvl_edge.bundle.errors import OutputError, PrepareError
from internvl_edge.bundle.manifest import file_entry, open_bundle
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.graphs.graph import Progress
from internvl_edge.export.output.destination import check_target
from internvl_edge.export.output.ownership import remove_own
from internvl_edge.export.output.work import NEW, check_space, say_kept, work_folder
from internvl_edge.export.prepare.check import check_prepared
from internvl_edge.export.prepare.prepack import compares_packed, prepack_graph
from internvl_edge.export.writer import ignore_total
from internvl_edge.runtime.backends.prepared import (
    MANIFEST,
    part_count,
    part_names,
    prepared_folder,
    prepared_manifest,
    superseded,
)
from internvl_edge.runtime.backends.products import UNSIGNED, bundle_form
from internvl_edge.runtime.backends.sessions import check_path

#: Packed weights are larger: column sums and scales lie between them (12 % at block 128).
GROWTH = 1.15


def prepare_bundle(
    path: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> Path:
    """Write the graphs of a bundle with their matrices packed for this CPU.

    Loading then maps the weights instead of copying them.

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
        CapacityError: no space.
        PrepareError: a graph is float16, or ONNX Runtime does not load what it packed.
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
    form = bundle_form(bundle.manifest)
    if not form.packs:
        raise PrepareError(
            "on this machine integer products are exact only with weights that are not packed:"
            " there is nothing to prepare"
        )
    total = sum(bundle.manifest.files[name].bytes for name in (*VISION_FILES, *LANGUAGE_FILES))
    # Each matrix packed and, where ONNX Runtime wants to see it, as it was.
    check_space(target, int(total * (GROWTH + compares_packed())))
    advance = (progress or ignore_total)(total)
    with work_folder(target) as work:
        _check_target(target, overwrite)  # another process may have been here meanwhile
        aside = work.fresh(NEW)
        for name in (VISION_GRAPH, LANGUAGE_GRAPH):
            parts = part_names(name, part_count(bundle.manifest, name))
            targets = [aside / part for part in parts]
            prepack_graph(bundle.file(name), targets, advance, unsigned=form == UNSIGNED)
        check_prepared(bundle, aside)
        files = {file.name: file_entry(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(prepared_manifest(bundle, files) + "\n", encoding="utf-8")
        work.publish(aside)
        for stale in superseded(target):
            say_kept(stale, remove_own(stale))
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise OutputError(f"{named(target)} exists", [Remedy.OVERWRITE])
    check_target(target, overwrite)
