"""Graphs for TensorRT as they were written when a pass took one sequence: of the golden model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, MANIFEST
from internvl_edge.bundle.manifest import file_entry, read_manifest


def of_one_sequence(bundle: Path, target: Path) -> Path:
    """Copy a bundle of the golden model, in float32, with the graph that was written earlier."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("engines"))
    manifest = read_manifest(target)
    graph = target / LANGUAGE_GRAPH
    shutil.copyfile(Path(__file__).with_name(f"{manifest.dialect}.onnx"), graph)
    files = {**manifest.files, LANGUAGE_GRAPH: file_entry(graph)}
    (target / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    return target
