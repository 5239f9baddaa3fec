"""Checkpoint to bundle: read, calibrate where integers are asked for, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from internvl_edge.export.budget import within_budget
from internvl_edge.export.calibration_run import calibrate, open_workspace
from internvl_edge.export.checkpoint import Checkpoint
from internvl_edge.export.decisions import DEFAULT_OPTIONS, Decisions, QuantOptions, Recipe
from internvl_edge.export.dialects.onnxruntime import takes_int8_cache
from internvl_edge.export.graph import Progress
from internvl_edge.export.report import most_sensitive, to_json, unit_costs
from internvl_edge.export.writer import ignore_total, write_bundle
from internvl_edge.runtime.contract import (
    MANIFEST,
    CachePrecision,
    LanguagePrecision,
    VisionPrecision,
    default_cache,
)
from internvl_edge.runtime.errors import BundleError, CheckpointError, ExportError
from internvl_edge.runtime.prompt import IMAGE_CONTEXT, get_template
from internvl_edge.runtime.specs import ModelSpec
from internvl_edge.runtime.tokenizer import Tokenizer, tokenizer_files


def export_bundle(
    checkpoint: str | Path,
    output: str | Path,
    *,
    vision: VisionPrecision = "fp32",
    language: LanguagePrecision = "fp32",
    kv: CachePrecision | None = None,
    options: QuantOptions = DEFAULT_OPTIONS,
    calibration: str | Path | None = None,
    budget: float | None = None,
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
        budget: keep as many units at half precision, the most sensitive first, as bring the KL
            divergence of the logits on the calibration data below this, in nats.
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
    if recipe.kv == "int8" and not takes_int8_cache():
        raise ExportError(
            "kv int8 needs an onnxruntime whose GroupQueryAttention takes a quantised cache, as"
            " 1.31 does; update onnxruntime (Python 3.11 or later)"
        )
    decisions: Decisions = {}
    record, workspace = None, None
    if recipe.needs_calibration:
        workspace = open_workspace(target, source, recipe, calibration)
        advance = calibration_progress or ignore_total
        decisions, record, samples = calibrate(source, recipe, calibration, workspace, advance)
        if budget is not None:
            options = within_budget(source, recipe, decisions, samples, tokenizer, budget)
    costs = unit_costs(decisions)
    kept = (*options.keep_fp16, *most_sensitive(costs, options.keep_worst))
    recipe = replace(recipe, options=replace(options, keep_fp16=kept))
    report = None if record is None else to_json(record, costs, kept)
    write_bundle(
        source, target, recipe, decisions, tokenizer=tokenizer, report=report, progress=progress
    )
    if workspace is not None:
        workspace.remove()
    return target


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
