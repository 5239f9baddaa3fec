"""How much room on the disk a calibrated export takes at most, before it begins."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.calibrate import Sample
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.calibration.units import HEAD_ROWS
from internvl_edge.export.checkpoint.names import HEAD, is_language, tensor_shapes
from internvl_edge.export.formats.quantize import block_bytes
from internvl_edge.export.sizes import OTHER, bundle_bytes, part_of

FLOAT_BYTES = 4
#: Vectors kept for each linear layer, over its inputs and its outputs: mean squares, factors.
INPUT_VECTORS, OUTPUT_VECTORS = 3, 1


def room_for_export(
    spec: ModelSpec, recipe: Recipe, samples: Sequence[Sample], bundle: int, *, budget: bool
) -> int:
    """Return the most bytes that an export with calibration takes at one time.

    Either a unit runs, with the activations it reads and those it makes beside the decisions so
    far; or the bundle is written beside all of them.

    Args:
        bundle: bytes of the bundle.
        budget: whether whole bundles are written on the way, one after another; the float one is
            the largest.
    """
    decided, activations = _decision_bytes(spec, recipe), _activation_bytes(spec, samples)
    floats = Recipe("fp32", "fp32", "fp32")
    tried = sum(bundle_bytes(spec, floats).values()) if budget else 0
    running = 2 * activations + _unit_bytes(spec)
    return decided + max(running, activations + max(tried, bundle))


def _decision_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    total = 0
    for name, shape in tensor_shapes(spec).items():
        if part_of(name) in (OTHER, "embedding") or not recipe.quantises(name):
            continue
        rows, columns = shape
        total += FLOAT_BYTES * (INPUT_VECTORS * columns + OUTPUT_VECTORS * rows)
        if recipe.compensates and is_language(name):  # GPTQ's rounded weights
            total += block_bytes(rows, columns, recipe.block_form(name), FLOAT_BYTES)
    return total


def _activation_bytes(spec: ModelSpec, samples: Sequence[Sample]) -> int:
    """Of the unit that makes most."""
    vision, language = spec.vision, spec.language
    tiles = sum(len(sample.tiles) for sample in samples)
    tokens = sum(len(sample.ids) for sample in samples)
    rows = sum(min(HEAD_ROWS, len(sample.ids)) for sample in samples)
    return FLOAT_BYTES * max(
        tiles * vision.sequence_length * vision.hidden_size,
        tiles * vision.tokens_per_tile * language.hidden_size,
        tokens * language.hidden_size,
        rows * language.vocab_size,
    )


def _unit_bytes(spec: ModelSpec) -> int:
    """Of the float weights of the largest unit."""
    sizes: Counter[str] = Counter()
    for name, shape in tensor_shapes(spec).items():
        layer = re.match(r"(.*\.)?layers\.\d+\.", name)
        unit = layer[0] if layer else HEAD if name == HEAD else part_of(name)
        if unit != "embedding":  # the table is read row by row
            sizes[unit] += FLOAT_BYTES * math.prod(shape)
    return max(sizes.values())
