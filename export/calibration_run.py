"""Calibration as `export` runs it: data, progress, and a workspace beside the output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.calib_data.generator import generate
from internvl_edge.calib_data.items import load_items
from internvl_edge.export.calibrate import Calibration, Sample
from internvl_edge.export.checkpoint import Checkpoint
from internvl_edge.export.decisions import Decisions, Recipe
from internvl_edge.export.graph import Progress
from internvl_edge.export.samples import DEFAULT_ITEMS, make_samples
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
    target: Path, source: Checkpoint, recipe: Recipe, calibration: str | Path | None
) -> Workspace:
    """The directory `<output>.calibration`, emptied unless it is of this very run."""
    identity = [
        *(f"{path.name} {path.stat().st_size}" for path in source.files),
        str(source.spec),
        str(recipe.language_form),
        "generator" if calibration is None else _fingerprint(Path(calibration)),
    ]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    return Workspace(target.with_name(f"{target.name}.calibration"), key)


def calibrate(
    source: Checkpoint,
    recipe: Recipe,
    calibration: str | Path | None,
    workspace: Workspace,
    progress: Callable[[int], Progress],
) -> tuple[Decisions, CalibrationRecord, list[Sample]]:
    """Run the float model over the calibration data and decide every layer.

    Returns:
        The decisions, a record of the data for the bundle, and the data as the model saw it.
    """
    items = generate(DEFAULT_ITEMS) if calibration is None else load_items(Path(calibration))
    tokenizer = Tokenizer.load(source.directory)
    samples = make_samples(source.spec, tokenizer, items)
    # Patch embedding, projector and head beside the layers.
    units = 3 + source.spec.vision.layers_run + source.spec.language.num_hidden_layers
    decisions = Calibration(
        source,
        samples,
        tokenizer.token_id(IMAGE_CONTEXT),
        recipe,
        workspace,
        progress(units),
    ).run()
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.tiles.tobytes())
        digest.update(sample.ids.tobytes())
    generated = calibration is None
    record = CalibrationRecord(
        source="generator" if generated else Path(calibration or "").name,
        licence="CC0-1.0" if generated else "the owner's",
        items=len(samples),
        tiles=sum(len(sample.tiles) for sample in samples),
        tokens=sum(len(sample.ids) for sample in samples),
        sha256=digest.hexdigest(),
    )
    return decisions, record, samples


def _fingerprint(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return str([(file.name, file.stat().st_size) for file in files if file.is_file()])
