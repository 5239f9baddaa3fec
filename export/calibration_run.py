"""Calibration as `export` runs it: data, progress, and a workspace beside the output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from internvl_edge.calib_data.generator import generate
from internvl_edge.calib_data.items import load_items
from internvl_edge.export.calibrate import Calibration
from internvl_edge.export.checkpoint import Checkpoint
from internvl_edge.export.decisions import Decisions, Recipe
from internvl_edge.export.graph import Progress
from internvl_edge.export.samples import DEFAULT_ITEMS, make_samples
from internvl_edge.export.workspace import Workspace
from internvl_edge.runtime.prompt import IMAGE_CONTEXT
from internvl_edge.runtime.tokenizer import Tokenizer


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
) -> Decisions:
    """Run the float model over the calibration data and decide every layer."""
    items = generate(DEFAULT_ITEMS) if calibration is None else load_items(Path(calibration))
    tokenizer = Tokenizer.load(source.directory)
    samples = make_samples(source.spec, tokenizer, items)
    # Patch embedding, projector and head beside the layers.
    units = 3 + source.spec.vision.layers_run + source.spec.language.num_hidden_layers
    return Calibration(
        source,
        samples,
        tokenizer.token_id(IMAGE_CONTEXT),
        recipe,
        workspace,
        progress(units),
    ).run()


def _fingerprint(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return str([(file.name, file.stat().st_size) for file in files if file.is_file()])
