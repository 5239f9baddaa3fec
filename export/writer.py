"""Writing a bundle: all files into an empty folder, the manifest last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from internvl_edge.bundle.contract import (
    EMBEDDING_SCALES,
    EMBEDDING_TABLE,
    MANIFEST,
    compute_dtype,
)
from internvl_edge.bundle.manifest import FileEntry, Manifest, file_entry
from internvl_edge.export.calibration.decisions import Decisions, Recipe, make_plan
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import EMBEDDING, tensor_shapes
from internvl_edge.export.checkpoint.weights import Weight, WeightReader
from internvl_edge.export.formats.packing import pack_table
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan, RescaledSource
from internvl_edge.export.graphs.dialects.registry import new_dialect
from internvl_edge.export.graphs.graph import GraphBuilder, Progress
from internvl_edge.export.graphs.language import build_language
from internvl_edge.export.graphs.vision import build_vision
from internvl_edge.export.inspection import parameter_counts
from internvl_edge.export.output.work import NEW, check_space, work_folder
from internvl_edge.export.sizes import OTHER, part_entries, part_of

NO_REPORTS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Layout:
    """What an export will write."""

    vision: GraphBuilder
    language: GraphBuilder
    embedding: list[Weight]  # the table, and its scales when it is quantised

    @property
    def weights(self) -> list[Weight]:
        return [*self.vision.weights, *self.language.weights, *self.embedding]

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def file_bytes(self) -> int:
        table = sum(weight.nbytes for weight in self.embedding)
        return self.vision.data_bytes + self.language.data_bytes + table


def write_bundle(
    source: WeightSource,
    target: Path,
    recipe: Recipe,
    decisions: Decisions,
    *,
    tokenizer: Sequence[Path],
    reports: Mapping[str, str] = NO_REPORTS,
    progress: Callable[[int], Progress] | None = None,
) -> None:
    """Write a model under a recipe and the decisions calibration made for it.

    Args:
        target: directory to create, or an existing bundle to replace.
        tokenizer, reports, progress: see `write_files`.

    Raises:
        CapacityError: no space; nothing is left behind.
        OutputError: the directory cannot be written.
    """
    with work_folder(Path(os.path.realpath(target))) as work:
        new = work.fresh(NEW)
        write_files(
            source, new, recipe, decisions, tokenizer=tokenizer, reports=reports, progress=progress
        )
        work.publish(new)


def write_files(
    source: WeightSource,
    folder: Path,
    recipe: Recipe,
    decisions: Decisions,
    *,
    tokenizer: Sequence[Path],
    reports: Mapping[str, str] = NO_REPORTS,
    progress: Callable[[int], Progress] | None = None,
) -> None:
    """Write a bundle's files into an empty folder, the manifest last.

    Args:
        tokenizer: files to copy.
        reports: further text files by name, such as quantisation.json.
        progress: called with the total of bytes; returns a function called with each increment.

    Raises:
        CapacityError: no space.
        OSError: the folder cannot be written.
    """
    plan = make_plan(recipe, decisions)
    layout = plan_export(source, recipe, plan)
    check_space(folder, layout.file_bytes)
    advance = (progress or ignore_total)(layout.weight_bytes)
    files = layout.vision.save(folder, advance) | layout.language.save(folder, advance)
    names = (EMBEDDING_TABLE, EMBEDDING_SCALES)[: len(layout.embedding)]
    for name, weight in zip(names, layout.embedding, strict=True):
        files[name] = _save_array(folder / name, weight, advance)
    for path in tokenizer:
        shutil.copyfile(path, folder / path.name)
        files[path.name] = file_entry(folder / path.name)
    for name, text in reports.items():
        (folder / name).write_text(text, encoding="utf-8")
        files[name] = file_entry(folder / name)
    manifest = Manifest(
        spec=source.spec,
        dialect=recipe.dialect,
        vision=recipe.vision,
        language=recipe.language,
        kv=recipe.kv,
        embedding=recipe.embedding,
        parameters=parameter_counts(source.spec),
        files=files,
        parts=part_entries(layout.weights, plan),
    )
    (folder / MANIFEST).write_text(manifest.to_json() + "\n", encoding="utf-8")


def planned_layout(source: WeightSource, recipe: Recipe) -> Layout:
    """Plan the export before calibration has decided anything: formats are known by then.

    Raises:
        OptionsError: the dialect does not take a format, or a shape in it.
    """
    linears = {
        name: LinearPlan(kind, recipe.block_form(name) if kind == "blocks" else None)
        for name in tensor_shapes(source.spec)
        if part_of(name) not in (OTHER, "embedding") and (kind := recipe.kind(name)) != "float"
    }
    return plan_export(source, recipe, QuantPlan(linears))


def check_half_weights(layout: Layout) -> None:
    """Read the weights that will be stored in float16: hours of calibration may follow.

    Raises:
        CheckpointError: one is NaN or infinite.
        RangeError: one does not fit.
    """
    for weight in layout.weights:
        if weight.dtype == "float16":
            for _ in weight.cast_blocks():
                pass


def plan_export(source: WeightSource, recipe: Recipe, plan: QuantPlan) -> Layout:
    """Build both graphs; no weight beyond the vision embeddings is read yet."""
    rescaled = RescaledSource(source, plan)
    reader = WeightReader(rescaled, compute_dtype(recipe.vision, recipe.dialect))
    vision = new_dialect(recipe.dialect, "vision", plan, reader.dtype)
    build_vision(source.spec, vision, reader, recipe.vision)
    reader = WeightReader(rescaled, compute_dtype(recipe.language, recipe.dialect))
    language = new_dialect(recipe.dialect, "language", plan, reader.dtype)
    build_language(source.spec.language, language, reader, recipe.language, recipe.kv)
    table = reader.tensor(EMBEDDING)
    if recipe.embedding == "int8":
        embedding = pack_table(replace(table, dtype="float32"))
    else:
        embedding = [table]
    return Layout(vision.graph, language.graph, embedding)


def _save_array(path: Path, weight: Weight, progress: Progress) -> FileEntry:
    """A plain .npy file, so that the runtime can map it and gather rows on the host."""
    with path.open("wb") as stream:
        header = {"descr": np.dtype(weight.dtype).str, "fortran_order": False}
        npy_format.write_array_header_1_0(stream, header | {"shape": weight.shape})
        for block in weight.cast_blocks():
            stream.write(np.ascontiguousarray(block).data)
            progress(block.nbytes)
    return file_entry(path)


def ignore_total(_: int) -> Progress:
    return lambda _: None
