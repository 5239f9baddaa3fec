"""How many bytes a bundle's weights take, part by part: computed from the spec, and as planned.

`bundle_bytes` knows shapes and formats only, so that a size can be told before anything is read;
`part_entries` adds up what an export is about to write. The tests hold the one to the other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from internvl_edge.bundle.contract import compute_dtype, embedding_runs
from internvl_edge.bundle.manifest import PartEntry
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.checkpoint.names import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    VISION,
    is_language,
    tensor_shapes,
)
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import block_bytes
from internvl_edge.runtime.inspection import ITEM_BYTES

#: The parts of a bundle's weights and how the names of their tensors begin. What is left over
#: (norms, biases, positions, the patch embedding, scales of the KV cache) is `OTHER`.
PARTS = {
    "vision_linears": rf"{re.escape(VISION)}layers\.\d+\.(qkv|proj|fc[12])\.weight",
    "projector": rf"{re.escape(PROJECTOR)}fc[12]\.weight",
    "decoder_linears": r"layers\.\d+\.(qkv|out|gate|up|down|experts_(gated|down))\.weight",
    "head": re.escape(HEAD),
    "embedding": re.escape(EMBEDDING),
}
OTHER = "other"

#: Vectors that TensorRT's graphs keep in float32: norms and LayerScale.
WIDE = r".*norm\d?\.(weight|bias)|.*\.ls[12]"


def bundle_bytes(spec: ModelSpec, recipe: Recipe) -> dict[str, int]:
    """Bytes of the stored tensors by part.

    Exact for the matrices, and for the onnxruntime dialect's vectors, but for what calibration
    finds: a float per input of the few layers whose rescaling no earlier weight can take up, and
    layers a float16 graph must run in float32. A data file also pads every tensor to a page
    (4 KiB).

    Args:
        spec: of the model.
        recipe: dialect; precision of each part; block and symmetry; what is kept at half precision.

    Returns:
        Bytes for each of `PARTS` and `OTHER`, in that order.
    """
    sizes = dict.fromkeys((*PARTS, OTHER), 0)
    shapes = _stored_shapes(spec)
    for name, shape in shapes.items():
        part = part_of(name)
        if part == "embedding":
            sizes[part] += _table_bytes(shape, recipe)
        elif part != OTHER:
            sizes[part] += _linear_bytes(name, shape, recipe)
        elif not _absorbed(name, recipe):
            sizes[part] += math.prod(shape) * _vector_bytes(name, recipe)
    if recipe.kv == "int8":  # a float32 scale per key and value lane
        lanes = 2 * spec.language.key_value_size
        sizes[OTHER] += spec.language.num_hidden_layers * lanes * 4
    return sizes


def part_of(name: str) -> str:
    """The part a stored tensor belongs to; its name begins with the canonical one."""
    return next((part for part, begin in PARTS.items() if re.match(begin, name)), OTHER)


def part_entries(weights: Iterable[Weight], plan: QuantPlan) -> dict[str, PartEntry]:
    """What the manifest says of each part: bytes, and how many matrices at which precision."""
    sizes = dict.fromkeys((*PARTS, OTHER), 0)
    matrices: dict[str, dict[str, list[Weight]]] = {part: {} for part in sizes}
    for weight in weights:
        part = part_of(weight.name)
        sizes[part] += weight.nbytes
        if part != OTHER and (named := re.match(PARTS[part], weight.name)):
            matrices[part].setdefault(named[0], []).append(weight)
    return {
        part: PartEntry(
            size, Counter(_label(w, plan.linears.get(name)) for name, w in matrices[part].items())
        )
        for part, size in sizes.items()
    }


def _label(stored: list[Weight], plan: LinearPlan | None) -> str:
    """Precision, for people, of one matrix stored as these tensors: the largest are its values."""
    scales = [weight for weight in stored if weight.name.endswith(".scales")]
    if plan is not None and plan.form is not None and any(len(s.shape) > 1 for s in scales):
        return f"int{plan.form.bits} block {plan.form.block}"
    dtype = max(stored, key=lambda weight: weight.nbytes).dtype
    return {"float32": "fp32", "float16": "fp16"}.get(dtype, dtype)


def _stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The model's tensors without the tower's unused layers, positions at the tiles' grid.

    The class embedding is added to its position beforehand.
    """
    shapes = {
        name: shape
        for name, shape in tensor_shapes(spec).items()
        if (layer := re.match(rf"{re.escape(VISION)}layers\.(\d+)\.", name)) is None
        or int(layer[1]) < spec.vision.layers_run
    }
    del shapes[f"{VISION}class_embedding"]
    positions = (1, spec.vision.sequence_length, spec.vision.hidden_size)
    return shapes | {f"{VISION}position_embedding": positions}


def _linear_bytes(name: str, shape: tuple[int, ...], recipe: Recipe) -> int:
    """Scales are of the type the graph computes in; QGemm takes an int32 bias with each."""
    rows, columns = shape
    kind, float_bytes = recipe.kind(name), _float_bytes(name, recipe)
    if kind == "blocks":
        form = recipe.block_form(name)
        if recipe.traits.row_scales and form.bits == 8:
            return rows * (columns + float_bytes)
        return block_bytes(rows, columns, form, float_bytes)
    if kind == "int8":
        bias_bytes = 4 if recipe.traits.integer_bias else 0
        return rows * (columns + float_bytes + bias_bytes)
    return rows * columns * (2 if kind == "fp16" else float_bytes)


def _table_bytes(shape: tuple[int, ...], recipe: Recipe) -> int:
    rows, columns = shape
    scales = 4 * embedding_runs(columns) if recipe.embedding == "int8" else 0
    return rows * (columns * ITEM_BYTES[recipe.embedding] + scales)


def _absorbed(name: str, recipe: Recipe) -> bool:
    """Whether a vector went into QGemm: a bias as its int32 one, LayerScale as its scales."""
    return recipe.traits.integer_bias and any(
        recipe.kind(linear) == "int8" for linear in _absorbing(name)
    )


def _absorbing(name: str) -> Iterator[str]:
    prefix, _, last = name.rpartition(".")
    if last == "bias" and part_of(weight := f"{prefix}.weight") != OTHER:
        yield weight
    if last in ("ls1", "ls2"):
        yield f"{prefix}.{'proj' if last == 'ls1' else 'fc2'}.weight"


def _vector_bytes(name: str, recipe: Recipe) -> int:
    """Of a value outside of the matrices."""
    wide = recipe.traits.wide_vectors and re.fullmatch(WIDE, name)
    return 4 if wide else _float_bytes(name, recipe)


def _float_bytes(name: str, recipe: Recipe) -> int:
    """Of a value that is not quantised: of the type the graph computes in."""
    precision = recipe.language if is_language(name) else recipe.vision
    return np.dtype(compute_dtype(precision, recipe.dialect)).itemsize
