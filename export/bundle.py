"""Checkpoint to bundle: both graphs, the embedding table, the tokenizer, the manifest."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from internvl_edge.export.calibration_run import CalibrationRecord, calibrate, open_workspace
from internvl_edge.export.checkpoint import Checkpoint, WeightSource
from internvl_edge.export.decisions import (
    DEFAULT_OPTIONS,
    Decisions,
    QuantOptions,
    Recipe,
    make_plan,
)
from internvl_edge.export.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graph import GraphBuilder, Progress
from internvl_edge.export.inspection import parameter_counts
from internvl_edge.export.language import build_language
from internvl_edge.export.mapping import TOK_EMBEDDINGS
from internvl_edge.export.packing import pack_table
from internvl_edge.export.plan import QuantPlan, RescaledSource
from internvl_edge.export.report import most_sensitive, to_json, unit_costs
from internvl_edge.export.vision import build_vision
from internvl_edge.export.weights import Weight, WeightReader
from internvl_edge.runtime.bundle import FileEntry, Manifest, file_entry
from internvl_edge.runtime.contract import (
    COMPUTE_DTYPE,
    EMBEDDING_SCALES,
    EMBEDDING_TABLE,
    MANIFEST,
    QUANTISATION_REPORT,
    CachePrecision,
    LanguagePrecision,
    VisionPrecision,
    default_cache,
)
from internvl_edge.runtime.errors import BundleError, CheckpointError, ExportError
from internvl_edge.runtime.prompt import IMAGE_CONTEXT, get_template
from internvl_edge.runtime.specs import ModelSpec
from internvl_edge.runtime.tokenizer import Tokenizer, tokenizer_files

#: Room asked for beyond the weights: graphs, tokenizer, manifest, file system overhead.
SLACK_BYTES = 16 << 20


@dataclass(frozen=True)
class Layout:
    """What an export will write."""

    vision: GraphBuilder
    language: GraphBuilder
    embedding: list[Weight]  # the table, and its scales when it is quantised

    @property
    def weight_bytes(self) -> int:
        parts = [*self.vision.weights, *self.language.weights, *self.embedding]
        return sum(weight.nbytes for weight in parts)

    @property
    def file_bytes(self) -> int:
        table = sum(weight.nbytes for weight in self.embedding)
        return self.vision.data_bytes + self.language.data_bytes + table


def export_bundle(
    checkpoint: str | Path,
    output: str | Path,
    *,
    vision: VisionPrecision = "fp32",
    language: LanguagePrecision = "fp32",
    kv: CachePrecision | None = None,
    options: QuantOptions = DEFAULT_OPTIONS,
    calibration: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
    calibration_progress: Callable[[int], Progress] | None = None,
) -> Path:
    """Convert a checkpoint directory into a bundle.

    Args:
        checkpoint: Hugging Face directory in the InternVL-Chat-V1-5 layout.
        output: directory to create; written beside its place and renamed when complete.
        vision: precision of the vision tower's and projector's linear layers.
        language: precision of the decoder's linear layers.
        kv: precision of the KV cache; None stores keys and values as they are computed.
        options: how to quantise; see `QuantOptions`.
        calibration: folder or .jsonl with pictures and prompts; None uses the generator.
        overwrite: replace an existing bundle at `output`.
        progress: called with the total of bytes; returns a function called with each increment.
        calibration_progress: the same for calibration, counting units of the model.

    Returns:
        Path of the bundle.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        CalibrationDataError: the calibration data cannot be read.
        ExportError: the bundle cannot be written.
    """
    source = Checkpoint(checkpoint)
    target = Path(output)
    _check_target(target, overwrite)
    tokenizer = _check_tokenizer(source.directory, source.spec)
    recipe = Recipe(vision, language, kv or default_cache(language), options)
    if recipe.kv not in ("int8", default_cache(language)):
        raise ExportError(
            f"kv {kv} does not go with language {language}: attention takes int8 or"
            f" {default_cache(language)}, which is how that decoder computes"
        )
    decisions: Decisions = {}
    record: CalibrationRecord | None = None
    workspace = None
    if recipe.needs_calibration:
        workspace = open_workspace(target, source, recipe, calibration)
        advance = calibration_progress or _ignore_total
        decisions, record = calibrate(source, recipe, calibration, workspace, advance)
    costs = unit_costs(decisions)
    kept = (*options.keep_fp16, *most_sensitive(costs, options.keep_worst))
    recipe = replace(recipe, options=replace(options, keep_fp16=kept))
    layout = plan_export(source, recipe, make_plan(recipe, decisions))
    _check_space(target, layout.file_bytes)
    advance_bytes = (progress or _ignore_total)(layout.weight_bytes)
    with _written_aside(Path(os.path.realpath(target))) as aside:
        files = layout.vision.save(aside, advance_bytes)
        files |= layout.language.save(aside, advance_bytes)
        names = (EMBEDDING_TABLE, EMBEDDING_SCALES)[: len(layout.embedding)]
        for name, weight in zip(names, layout.embedding, strict=True):
            files[name] = _save_array(aside / name, weight, advance_bytes)
        for path in tokenizer:
            shutil.copyfile(path, aside / path.name)
            files[path.name] = file_entry(aside / path.name)
        if record is not None:
            report = to_json(record, costs, kept)
            (aside / QUANTISATION_REPORT).write_text(report, encoding="utf-8")
            files[QUANTISATION_REPORT] = file_entry(aside / QUANTISATION_REPORT)
        manifest = Manifest(
            spec=source.spec,
            dialect=OnnxRuntimeDialect.name,
            vision=vision,
            language=language,
            kv=recipe.kv,
            embedding=recipe.embedding,
            parameters=parameter_counts(source.spec),
            files=files,
        )
        (aside / MANIFEST).write_text(manifest.to_json() + "\n", encoding="utf-8")
    if workspace is not None:
        workspace.remove()
    return target


def plan_export(source: WeightSource, recipe: Recipe, plan: QuantPlan) -> Layout:
    """Build both graphs; no weight beyond the vision embeddings is read yet."""
    rescaled = RescaledSource(source, plan)
    vision_graph, language_graph = GraphBuilder("vision"), GraphBuilder("language")
    vision_reader = WeightReader(rescaled, COMPUTE_DTYPE[recipe.vision])
    language_reader = WeightReader(rescaled, COMPUTE_DTYPE[recipe.language])
    build_vision(source.spec, OnnxRuntimeDialect(vision_graph, plan), vision_reader, recipe.vision)
    build_language(
        source.spec.language,
        OnnxRuntimeDialect(language_graph, plan),
        language_reader,
        recipe.language,
        recipe.kv,
    )
    table = language_reader.tensor(TOK_EMBEDDINGS)
    embedding = pack_table(table) if recipe.embedding == "int8" else [table]
    return Layout(vision_graph, language_graph, embedding)


def _save_array(path: Path, weight: Weight, progress: Progress) -> FileEntry:
    """A plain .npy file, so that the runtime can map it and gather rows on the host."""
    with path.open("wb") as stream:
        header = {"descr": np.dtype(weight.dtype).str, "fortran_order": False}
        npy_format.write_array_header_1_0(stream, header | {"shape": weight.shape})
        for block in weight.cast_blocks():
            stream.write(np.ascontiguousarray(block).data)
            progress(block.nbytes)
    return file_entry(path)


def _check_tokenizer(directory: Path, spec: ModelSpec) -> list[Path]:
    """The tokenizer files, once they are known to serve this checkpoint."""
    try:
        tokenizer = Tokenizer.load(directory)
        tokenizer.token_id(IMAGE_CONTEXT)
        tokenizer.token_id(get_template(spec.prompt.template).stop)
    except BundleError as error:
        raise CheckpointError(f"tokenizer: {error}") from error
    if tokenizer.size > spec.language.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.size} ids, the embedding table only"
            f" {spec.language.vocab_size} rows; its files belong to another checkpoint"
        )
    return list(tokenizer_files(directory))


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise ExportError(f"{target} exists; choose another output or pass --overwrite")
    if not (target / MANIFEST).exists():
        raise ExportError(f"{target} is not a bundle, so it will not be replaced; remove it first")


def _check_space(target: Path, needed: int) -> None:
    parent = target.absolute().parent
    try:
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ExportError(f"cannot write to {parent}: {error.strerror}") from error
    if free < needed + SLACK_BYTES:
        raise ExportError(
            f"{parent} has {free / 1e9:.1f} GB free, the bundle takes {needed / 1e9:.1f} GB;"
            " free some space or choose another disk"
        )


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its place on success and vanishes otherwise."""
    aside = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        _replace(aside, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(
                f"no space left while writing {target}: {error.strerror}; nothing was kept"
            ) from error
        raise ExportError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; a bundle that stood there returns if that fails."""
    old = target.with_name(f"{target.name}.partial-old-{os.getpid()}")
    try:
        if target.exists():
            target.rename(old)
        aside.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _ignore_total(_: int) -> Progress:
    return lambda _: None
