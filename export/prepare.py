"""`internvl-edge prepare`: pack a bundle's weights for this machine, once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from internvl_edge.export.graph import Progress
from internvl_edge.export.prepack import prepack_graph
from internvl_edge.export.writer import check_space, ignore_total, written_aside
from internvl_edge.runtime.backends.sessions import check_path
from internvl_edge.runtime.bundle import file_entry, open_bundle
from internvl_edge.runtime.contract import (
    LANGUAGE_FILES,
    LANGUAGE_GRAPH,
    VISION_FILES,
    VISION_GRAPH,
)
from internvl_edge.runtime.errors import ExportError
from internvl_edge.runtime.prepared import (
    MANIFEST,
    part_count,
    part_names,
    prepared_folder,
    prepared_manifest,
    superseded,
)
from internvl_edge.runtime.quoting import named

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
        ExportError: it exists already, no space, the bundle cannot be written to, or a graph is
            float16.
    """
    bundle = open_bundle(path)
    for part in ("vision", "language"):
        if getattr(bundle.manifest, part) == "fp16":
            raise ExportError(
                f"the {part} graph is fp16, which the CPU holds in memory as float32: there is"
                f" nothing to map; export with --{part} int8"
            )
    target = prepared_folder(bundle)
    check_path(target)
    if target.exists() and not overwrite:
        raise ExportError(f"{named(target)} exists; pass --overwrite to write it again")
    total = sum(bundle.manifest.files[name].bytes for name in (*VISION_FILES, *LANGUAGE_FILES))
    check_space(target, int(total * GROWTH))
    advance = (progress or ignore_total)(total)
    with written_aside(target) as aside:
        for name in (VISION_GRAPH, LANGUAGE_GRAPH):
            parts = part_names(name, part_count(bundle.manifest, name))
            prepack_graph(bundle.file(name), [aside / part for part in parts], advance)
        files = {file.name: file_entry(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(prepared_manifest(bundle, files) + "\n", encoding="utf-8")
    for stale in superseded(target):
        shutil.rmtree(stale, ignore_errors=True)
    return target
