"""What float16 cannot hold: refused by name where no layer can be kept in float32 instead.

TensorRT's graphs run single linear layers in float32 and keep what lies between them in it, so that
only what attention gives can overflow there. ONNX Runtime's compute a whole part in one type.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from internvl_edge.bundle.errors import RangeError, RangeWarning
from internvl_edge.bundle.remedies import Remedy, told
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.calibration.ranges import END, INPUT, NORM, OUTPUT, ValueRange
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import is_language

#: Linear layers that read what attention gives; in the decoder, one that makes what is cached.
_ATTENDED = (".proj.weight", ".out.weight")
_CACHED = ".qkv.weight"
_PHRASES = {INPUT: "what {} reads", OUTPUT: "what {} gives", NORM: "what {} reads"}


def check_ranges(found: Sequence[ValueRange], recipe: Recipe, source: WeightSource) -> None:
    """Refuse values that overflow in a recipe's graphs.

    Args:
        found: the values that float16 does not hold, as calibration saw them.
        source: of the model's weights.

    Raises:
        RangeError: one overflows that is computed or cached in float16.

    Warns:
        RangeWarning: values come near an end, or lose precision; other pictures may go further.
    """
    exposed = [value for value in found if _is_exposed(value, recipe)]
    for value in exposed:
        if value.overflows:
            raise RangeError(_describe(value, source), _remedies(value, recipe, source))
    if exposed and not recipe.traits.layer_dtypes:
        worst = max(exposed, key=lambda value: value.largest)
        described, remedies = _describe(worst, source), _remedies(worst, recipe, source)
        warnings.warn(
            f"{len(exposed)} values come near the ends of float16 or lose precision in it:"
            f" {described}; if answers are refused or poor, {told(remedies, flags=True)}",
            RangeWarning,
            stacklevel=2,
        )


def _is_exposed(value: ValueRange, recipe: Recipe) -> bool:
    """Whether nothing keeps a value out of float16."""
    decoder, attended = is_language(value.weight), _is_attended(value)
    cached = value.place == OUTPUT and value.weight.endswith(_CACHED)
    if decoder and recipe.kv == "fp16" and (attended or cached):
        return True
    if not recipe.computes_in_float16(value.weight):
        return False
    return attended or not recipe.traits.layer_dtypes


def _is_attended(value: ValueRange) -> bool:
    return value.place == INPUT and value.weight.endswith(_ATTENDED)


def _describe(value: ValueRange, source: WeightSource) -> str:
    phrase = "attention in front of {}" if _is_attended(value) else _PHRASES[value.place]
    subject = phrase.format(source.origin(value.weight))
    return f"{subject} reaches {value.largest:.3g}, float16 ends at {END:.0f}"


def _remedies(value: ValueRange, recipe: Recipe, source: WeightSource) -> dict[Remedy, str]:
    decoder = is_language(value.weight)
    if decoder and not recipe.computes_in_float16(value.weight):
        return {Remedy.FP32_CACHE: ""}
    whole = {Remedy.FP32_LANGUAGE if decoder else Remedy.FP32_VISION: ""}
    if recipe.traits.layer_dtypes:
        return whole
    integers = Remedy.INT8_LANGUAGE if decoder else Remedy.INT8_VISION
    if decoder and source.spec.language.experts is not None:  # TensorRT's graphs have none
        return {**whole, integers: ""}
    kept = "whose graphs keep single layers in float32"
    return {**whole, integers: "", Remedy.FOR_TENSORRT: kept}
