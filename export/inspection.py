"""The `inspect` command for checkpoints: the same report as for a bundle, before exporting."""

from __future__ import annotations

import math
from pathlib import Path

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.names import HEAD, model_part, tensor_shapes
from internvl_edge.export.sizes import bundle_bytes
from internvl_edge.runtime.inspection import Report, describe, fits_in_memory

#: Bundles whose sizes are told, named by the decoder's precision.
RECIPES = {
    "fp32": Recipe("fp32", "fp32", "fp32"),
    "fp16": Recipe("fp16", "fp16", "fp16"),
    "int8": Recipe("int8", "int8", "fp32"),
    "int4": Recipe("int8", "int4", "fp32"),
}


def inspect_checkpoint(path: Path) -> Report:
    """Describe a checkpoint from its config and tensor headers; no weight is read.

    Raises:
        CheckpointError: not a checkpoint this project can export.
    """
    spec = Checkpoint(path).spec
    parameters = parameter_counts(spec)
    sizes = {name: sum(bundle_bytes(spec, recipe).values()) for name, recipe in RECIPES.items()}
    return {
        "kind": "checkpoint",
        "path": str(path),
        **describe(spec, parameters, "fp32"),
        "bundle_bytes": sizes,
        "fits_in_memory": {name: fits_in_memory(size) for name, size in sizes.items()},
    }


def parameter_counts(spec: ModelSpec) -> dict[str, int]:
    """Parameters by part, counted from the tensors a checkpoint of this spec holds."""
    counts: dict[str, int] = {"vision": 0, "projector": 0, "language": 0}
    tied = {HEAD} if spec.language.tied_head else set()
    for name, shape in tensor_shapes(spec).items():
        if name in tied:
            continue
        counts[model_part(name)] += math.prod(shape)
    return counts | {"total": sum(counts.values())}
