"""Calibration as `export` runs it: data, progress, and a workspace beside the output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.calib_data.generator import generate
from internvl_edge.calib_data.items import load_items
from internvl_edge.export.calibrate import Calibration, Sample
from internvl_edge.export.checkpoint import ModelSource
from internvl_edge.export.decisions import Decisions, Recipe
from internvl_edge.export.graph import Progress
from internvl_edge.export.observe import Device
from internvl_edge.export.samples import DEFAULT_ITEMS, make_samples
from internvl_edge.export.sensitivity import (
    AFFORDABLE,
    chosen_samples,
    multiply_adds,
    unit_divergences,
)
from internvl_edge.export.units import unit_names
from internvl_edge.export.workspace import Workspace
from internvl_edge.runtime.prompt import IMAGE_CONTEXT
from internvl_edge.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class CalibrationRecord:
    """What a bundle was calibrated with; `sha256` is of all tiles and token ids."""

    source: str
    licence: str
    items: int
    tiles: int
    tokens: int
    sha256: str


def open_workspace(
    target: Path, source: ModelSource, recipe: Recipe, calibration: str | Path | None
) -> Workspace:
    """The directory `<output>.calibration`, emptied unless it is of this very run."""
    identity = [
        *source.identity,
        str(source.spec),
        str(recipe),
        "generator" if calibration is None else _fingerprint(Path(calibration)),
    ]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    return Workspace(target.with_name(f"{target.name}.calibration"), key)


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        data: folder or .jsonl with pictures and prompts; None uses the generator.
        sensitivity: measure what each unit costs in KL divergence of the logits; None does where
            that is a matter of minutes (`sensitivity.AFFORDABLE`).
        device: where the float model runs.
    """

    data: str | Path | None = None
    sensitivity: bool | None = None
    device: Device = "cpu"


@dataclass(frozen=True)
class Calibrated:
    """The decisions, a record of the data for the bundle, and the data as the model saw it."""

    decisions: Decisions
    record: CalibrationRecord
    samples: Sequence[Sample]


def calibrate(
    source: ModelSource,
    recipe: Recipe,
    options: CalibrationOptions,
    workspace: Workspace,
    progress: Callable[[int], Progress],
) -> Calibrated:
    """Run the float model over the calibration data and decide every layer.

    Raises:
        CalibrationDataError: the data cannot be read.
        DeviceError: the device is not available, or ONNX Runtime fell back to another.
    """
    items = generate(DEFAULT_ITEMS) if options.data is None else load_items(Path(options.data))
    tokenizer = Tokenizer.load(source.directory)
    samples = make_samples(source.spec, tokenizer, items)
    context_id = tokenizer.token_id(IMAGE_CONTEXT)
    chosen = chosen_samples(source.spec, samples, context_id)
    measured = options.sensitivity
    if measured is None:
        affordable = multiply_adds(source.spec, chosen) <= AFFORDABLE
        measured = recipe.has_integers and affordable
    units = len(unit_names(source.spec))
    advance = progress(units * (2 if measured else 1))
    decisions = Calibration(
        source, samples, context_id, recipe, workspace, advance, options.device
    ).run()
    if measured:
        decisions |= unit_divergences(
            source, recipe, decisions, chosen, context_id, advance, options.device
        )
    return Calibrated(decisions, _record(options.data, samples), samples)


def _record(data: str | Path | None, samples: Sequence[Sample]) -> CalibrationRecord:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.tiles.tobytes())
        digest.update(sample.ids.tobytes())
    return CalibrationRecord(
        source="generator" if data is None else Path(data).name,
        licence="CC0-1.0" if data is None else "the owner's",
        items=len(samples),
        tiles=sum(len(sample.tiles) for sample in samples),
        tokens=sum(len(sample.ids) for sample in samples),
        sha256=digest.hexdigest(),
    )


def _fingerprint(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return str([(file.name, file.stat().st_size) for file in files if file.is_file()])
