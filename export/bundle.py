"""Checkpoint to bundle: read, calibrate where integers are asked for, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from internvl_edge.bundle.contract import (
    QUANTISATION_PLOT,
    QUANTISATION_REPORT,
    CachePrecision,
    DialectName,
    LanguagePrecision,
    VisionPrecision,
    default_cache,
    stored_name,
)
from internvl_edge.bundle.errors import (
    CheckpointError,
    OptionsError,
    RangeError,
)
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.budget import within_budget
from internvl_edge.export.calibration.decisions import (
    DEFAULT_OPTIONS,
    Decisions,
    QuantOptions,
    Recipe,
)
from internvl_edge.export.calibration.float16 import check_ranges
from internvl_edge.export.calibration.observe import Device, Site, check_device
from internvl_edge.export.calibration.plot import cost_plot
from internvl_edge.export.calibration.ranges import ranges_of
from internvl_edge.export.calibration.report import most_sensitive, to_json, unit_costs
from internvl_edge.export.calibration.run import (
    CalibrationData,
    CalibrationOptions,
    calibrate,
    calibration_key,
    load_calibration,
)
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, ModelSource
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.checkpoint.tokens import read_tokens
from internvl_edge.export.graphs.graph import Progress
from internvl_edge.export.output.destination import check_apart, check_target
from internvl_edge.export.output.work import (
    NEW,
    SCRATCH,
    WorkFolder,
    check_space,
    reusable_bytes,
    work_folder,
)
from internvl_edge.export.room import room_for_export
from internvl_edge.export.writer import (
    check_half_weights,
    ignore_total,
    planned_layout,
    write_files,
)
from internvl_edge.runtime.backends.int8_cache import REMEDY, takes_int8_cache
from internvl_edge.runtime.backends.ort import load_onnxruntime


def export_bundle(
    checkpoint: str | Path | ModelSource,
    output: str | Path,
    *,
    vision: VisionPrecision = "fp32",
    language: LanguagePrecision = "fp32",
    kv: CachePrecision | None = None,
    dialect: DialectName = "onnxruntime",
    options: QuantOptions = DEFAULT_OPTIONS,
    calibration: str | Path | None = None,
    calibration_device: Device = "cpu",
    sensitivity: bool | None = None,
    budget: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
    calibration_progress: Callable[[int], Progress] | None = None,
) -> Path:
    """Convert a checkpoint directory into a bundle.

    Args:
        checkpoint: Hugging Face directory in the original layout or in transformers' own, or
            weights that come from elsewhere.
        output: directory to create; written beside its place, in `<output>.work`, and renamed
            when complete. A calibration that is cut short goes on from there.
        vision: precision of the vision tower's and projector's linear layers.
        language: precision of the decoder's linear layers.
        kv: precision of the KV cache; None stores keys and values as they are computed.
        dialect: who the graphs are written for; the weights and scales are the same for all.
        options: how to quantise; see `QuantOptions`.
        calibration: folder or .jsonl with pictures and prompts; None uses the generator.
        calibration_device: where the float model runs for it.
        sensitivity: measure what each unit costs in KL divergence of the logits; None does where
            that takes minutes at most.
        budget: keep as many units at half precision, the most sensitive first, as bring the KL
            divergence of the logits on the calibration data below this, in nats.
        overwrite: replace an existing bundle at `output`, if all in it was written by this
            program.
        progress: called with the total of bytes; returns a function called with each increment.
        calibration_progress: the same for calibration, counting units of the model.

    Returns:
        Path of the bundle.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        CalibrationDataError: the calibration data cannot be read.
        DeviceError: the calibration's device is not available.
        OptionsError: options do not go together, or not with the model.
        RangeError: float16 does not hold the model's values.
        BusyError: another process works on the same output.
        OutputError: the bundle cannot be written, or is in the way.
        CapacityError: the disk has no room for it.
    """
    source = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    identity = source.identity
    target = Path(os.path.realpath(output))
    check_apart(target, source.directory, None if calibration is None else Path(calibration))
    check_target(target, overwrite)
    tokenizer = read_tokens(source.directory, source.spec).files
    recipe = Recipe(vision, language, kv or default_cache(language, dialect), options, dialect)
    _check_cache(recipe)
    _check_kept(source.spec, options)
    if budget is not None and not budget > 0:
        raise OptionsError(f"is {quoted(budget)}, it must be above 0", option="budget")
    layout = planned_layout(source, recipe)
    data, what, needed = None, "the bundle", layout.file_bytes
    if recipe.needs_calibration:
        check_device(calibration_device)
        data, what = load_calibration(source, calibration), "this export with its calibration"
        needed = room_for_export(
            source.spec, recipe, data.samples, needed, budget=budget is not None
        )
    check_space(target, needed - reusable_bytes(target), what)
    with work_folder(target) as work:
        check_target(target, overwrite)  # another export may have been here meanwhile
        decided = Decided(recipe)
        if data is None:
            work.drop_calibration()
        else:
            check_half_weights(layout)
            how = CalibrationOptions(calibration_device, sensitivity, budget)
            advance = calibration_progress or ignore_total
            decided = _decide(source, recipe, data, how, work, tokenizer, advance)
        new = work.fresh(NEW)
        write_files(
            source,
            new,
            decided.recipe,
            decided.decisions,
            tokenizer=tokenizer,
            reports=decided.reports,
            progress=progress,
        )
        if source.identity != identity:
            raise CheckpointError(f"{source.directory} was changed while it was read; export again")
        work.publish(new)
        work.forget_calibration()
    return target


@dataclass(frozen=True)
class Decided:
    """How a model is to be written, and what is reported about that, by file name."""

    recipe: Recipe
    decisions: Decisions = field(default_factory=dict)
    reports: Mapping[str, str] = field(default_factory=dict)


def _decide(
    source: ModelSource,
    recipe: Recipe,
    data: CalibrationData,
    how: CalibrationOptions,
    work: WorkFolder,
    tokenizer: Sequence[Path],
    progress: Callable[[int], Progress],
) -> Decided:
    """Calibrate, going on with what an interrupted run of the same kind decided.

    Raises:
        RangeError: float16 does not hold a part that is to be written in it.
        OptionsError: the budget cannot be met.
    """
    key = calibration_key(source, recipe, data, how.device)
    workspace = work.open_calibration(key)
    scratch = work.fresh(SCRATCH)
    decisions = calibrate(
        source, recipe, data, workspace, Site(how.device, scratch), progress, how.sensitivity
    )
    outside = ranges_of(decisions)
    try:
        check_ranges(outside, recipe, source)
    except RangeError:
        work.forget_calibration()  # the same export would only fail again
        raise
    options = recipe.options
    if how.budget is not None:
        options = within_budget(
            source, recipe, decisions, data.samples, tokenizer, how.budget, scratch
        )
    costs = unit_costs(decisions)
    kept = (*options.keep_fp16, *most_sensitive(costs, options.keep_worst))
    wide = outside if recipe.guards_float16 else None
    reports = {QUANTISATION_REPORT: to_json(data.record, costs, kept, wide)}
    if costs:
        reports[QUANTISATION_PLOT] = cost_plot(costs, kept)
    return Decided(replace(recipe, options=replace(options, keep_fp16=kept)), decisions, reports)


def _check_kept(spec: ModelSpec, options: QuantOptions) -> None:
    """Raise OptionsError unless each prefix is the beginning of a tensor's name, not of all."""
    names = [*map(stored_name, tensor_shapes(spec))]
    for prefix in options.keep_fp16:
        if not prefix or not any(name.startswith(prefix) for name in names):
            raise OptionsError(
                f"has {quoted(prefix)}, which no name begins with, such as {names[0]} and"
                f" {names[-1]}",
                option="keep_fp16",
            )


def _check_cache(recipe: Recipe) -> None:
    """Raise OptionsError unless the dialect's attention takes the KV cache's precision."""
    computed = default_cache(recipe.language, recipe.dialect)
    caches = recipe.traits.caches(computed)
    if recipe.kv == "int8" and not recipe.traits.int8_cache:
        raise OptionsError(
            f"kv int8 does not go with the {recipe.dialect} dialect: TensorRT's cache update"
            f" (TensorScatter) takes no integers, only {computed}",
            [Remedy.CACHE_AS_COMPUTED, Remedy.FOR_PORTABLE],
        )
    if recipe.kv not in caches:
        raise OptionsError(
            f"kv {recipe.kv} does not go with language {recipe.language} in graphs for"
            f" {recipe.dialect}; use {' or '.join(caches)}"
        )
    # Whoever runs the graphs: calibration measures what such a cache costs.
    if recipe.kv == "int8" and not takes_int8_cache():
        raise OptionsError(
            "kv int8 needs an onnxruntime whose attention takes a quantised cache on the CPU, which"
            f" {load_onnxruntime().__version__} does not; {REMEDY}"
        )
