"""Calibration as `export` runs it: the data, what decisions depend on, and the run itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl_edge.bundle.prompt import IMAGE_CONTEXT
from internvl_edge.calib_data.generator import generate
from internvl_edge.calib_data.items import load_items
from internvl_edge.export.calibration.calibrate import Calibration, Sample
from internvl_edge.export.calibration.decisions import Decisions, Recipe
from internvl_edge.export.calibration.observe import Device, Site
from internvl_edge.export.calibration.samples import DEFAULT_ITEMS, make_samples
from internvl_edge.export.calibration.sensitivity import (
    AFFORDABLE,
    chosen_samples,
    multiply_adds,
    unit_divergences,
)
from internvl_edge.export.calibration.units import unit_names
from internvl_edge.export.checkpoint.checkpoint import ModelSource
from internvl_edge.export.checkpoint.tokens import read_tokens
from internvl_edge.export.graphs.graph import Progress
from internvl_edge.export.output.workspace import Workspace
from internvl_edge.runtime.backends.ort import load_onnxruntime


@dataclass(frozen=True)
class CalibrationRecord:
    """What a bundle was calibrated with; `sha256` is of all tiles and token ids."""

    source: str
    licence: str
    items: int
    tiles: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        device: where the float model runs.
        sensitivity: measure what each unit costs in KL divergence of the logits; None does where
            that is a matter of minutes (`sensitivity.AFFORDABLE`).
        budget: see `export_bundle`.
    """

    device: Device = "cpu"
    sensitivity: bool | None = None
    budget: float | None = None


@dataclass(frozen=True)
class CalibrationData:
    """The data as the model sees it, and a record of it for the bundle."""

    samples: Sequence[Sample]
    record: CalibrationRecord
    context_id: int  # of image slots


def calibration_key(
    source: ModelSource, recipe: Recipe, data: CalibrationData, device: Device
) -> str:
    """Identify all that decisions depend on: weights, data, options, device, code and versions.

    The data is what the model sees of it, so that tokenizer, template and tiling count as well.
    """
    identity = [
        *source.identity,
        str(source.spec),
        str(recipe),
        data.record.sha256,
        str(data.context_id),
        device,
        _code_digest(),
        *(f"{package.__name__} {package.__version__}" for package in (np, load_onnxruntime())),
    ]
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()


def load_calibration(source: ModelSource, data: str | Path | None) -> CalibrationData:
    """Read calibration data and bring it into the form the model sees.

    Args:
        data: folder or .jsonl with pictures and prompts; None uses the generator.

    Raises:
        CalibrationDataError: the data cannot be read.
        ImageError: a picture cannot be decoded.
    """
    items = generate(DEFAULT_ITEMS) if data is None else load_items(Path(data))
    tokenizer = read_tokens(source.directory, source.spec).tokenizer
    samples = make_samples(source.spec, tokenizer, items)
    record = CalibrationRecord(
        source="generator" if data is None else Path(data).name,
        licence="CC0-1.0" if data is None else "the owner's",
        items=len(samples),
        tiles=sum(len(sample.tiles) for sample in samples),
        tokens=sum(len(sample.ids) for sample in samples),
        sha256=samples_digest(samples),
    )
    return CalibrationData(samples, record, tokenizer.token_id(IMAGE_CONTEXT))


def calibrate(
    source: ModelSource,
    recipe: Recipe,
    data: CalibrationData,
    workspace: Workspace,
    site: Site,
    progress: Callable[[int], Progress],
    sensitivity: bool | None = None,
) -> Decisions:
    """Run the float model over the calibration data and decide every layer.

    Args:
        site: where it runs.
        progress: called with the number of units; returns a function called with each increment.
        sensitivity: see `CalibrationOptions`.

    Raises:
        DeviceError: the device is not available, or ONNX Runtime fell back to another.
    """
    chosen = chosen_samples(source.spec, data.samples, data.context_id)
    if sensitivity is None:
        affordable = multiply_adds(source.spec, chosen) <= AFFORDABLE
        sensitivity = recipe.has_integers and affordable
    units = len(unit_names(source.spec))
    advance = progress(units * (2 if sensitivity else 1))
    decisions = Calibration(
        source, data.samples, data.context_id, recipe, workspace, advance, site
    ).run()
    if sensitivity:
        decisions |= unit_divergences(
            source, recipe, decisions, chosen, data.context_id, advance, site
        )
    return decisions


def samples_digest(samples: Sequence[Sample]) -> str:
    """Hash all tiles and token ids, and which sequence they are in (hex sha256)."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.tiles.shape} {sample.ids.shape}\n".encode())
        digest.update(sample.tiles.tobytes())
        digest.update(sample.ids.tobytes())
    return digest.hexdigest()


def _code_digest() -> str:
    """Hash the sources of `bundle`, `export` and `runtime`: other code may decide otherwise."""
    rooms = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for room in ("bundle", "export", "runtime"):
        for path in sorted((rooms / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
