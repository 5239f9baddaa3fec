"""From statistics to a plan: the recipe a user asks for, and what each unit decides under it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import (
    DIALECTS,
    CachePrecision,
    DialectName,
    DialectTraits,
    LanguagePrecision,
    VisionPrecision,
    compute_dtype,
    stored_name,
)
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.calibration.gptq import error_factors, gptq_blocks
from internvl_edge.export.calibration.groups import Group
from internvl_edge.export.calibration.observe import Collector
from internvl_edge.export.calibration.ranges import wide_linears
from internvl_edge.export.calibration.search import full_scale, search, unsearched
from internvl_edge.export.checkpoint.checkpoint import FloatSource, WeightSource
from internvl_edge.export.checkpoint.names import (
    EXPERT_MATRICES,
    HEAD,
    decoder_prefix,
    is_language,
    language_shapes,
    tensor_shapes,
)
from internvl_edge.export.formats.packing import THREADS
from internvl_edge.export.formats.plan import CacheScales, Kind, LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import CLIP_RATIOS, INT8_MAX, BlockFormat, Blocks, Floats

#: What units decide, flat so that it can be saved: "kind:tensor" -> array.
#: Kinds: row, column (factors), scale, naive_scale (int8 input), factors (explicit), square,
#: error, unit (SQNR and cosine, by unit), key, value, naive_value (cache scales, by layer),
#: packed, packed_scales, packed_zeros; range, wide (see `ranges`).
Decisions = dict[str, Any]

#: Rows of each matrix the search looks at.
SEARCH_ROWS = 256
#: Rows GPTQ takes at a time, per thread.
GPTQ_ROWS = 1024


@dataclass(frozen=True)
class QuantOptions:
    """How to quantise.

    Attributes:
        block: inputs that share a scale in block formats.
        symmetric: of block formats: fixed zero point, or one stored per block.
        head_bits: of the head where the language model is stored as integers: 8 or 4.
        naive: plain round to nearest with full ranges, for comparison.
        keep_fp16: prefixes of tensor names, as bundles store them, that stay at half precision.
        keep_worst: so many more units stay at half precision: those that lose most.
    """

    block: int = 128
    symmetric: bool = True
    head_bits: Literal[4, 8] = 8
    naive: bool = False
    keep_fp16: tuple[str, ...] = ()
    keep_worst: int = 0


DEFAULT_OPTIONS = QuantOptions()


@dataclass(frozen=True)
class Recipe:
    """What a user asks for, part by part."""

    vision: VisionPrecision
    language: LanguagePrecision
    kv: CachePrecision
    options: QuantOptions = DEFAULT_OPTIONS
    dialect: DialectName = "onnxruntime"

    @property
    def traits(self) -> DialectTraits:
        """What graphs of its dialect take and give."""
        return DIALECTS[self.dialect]

    @property
    def embedding(self) -> CachePrecision:
        """The table follows the decoder; 8 bits are enough for a lookup."""
        return "int8" if self.language == "int4" else self.language

    @property
    def has_integers(self) -> bool:
        return self.vision == "int8" or self.language in ("int8", "int4") or self.kv == "int8"

    @property
    def guards_float16(self) -> bool:
        """Whether linear layers that float16 is too small for are kept in float32."""
        parts = (self.vision, self.language)
        return self.traits.layer_dtypes and any(map(self._is_half, parts))

    @property
    def needs_calibration(self) -> bool:
        """Whether anything depends on the model's values: scales, or that float16 holds them."""
        return self.has_integers or self.has_halves

    @property
    def has_halves(self) -> bool:
        """Whether anything is computed or cached in float16."""
        return self.kv == "fp16" or any(map(self._is_half, (self.vision, self.language)))

    def computes_in_float16(self, name: str) -> bool:
        """Whether the graph of a tensor's part computes in float16."""
        return self._is_half(self.language if is_language(name) else self.vision)

    def _is_half(self, part: VisionPrecision | LanguagePrecision) -> bool:
        return compute_dtype(part, self.dialect) == "float16"

    def quantises(self, name: str) -> bool:
        """Whether the part a tensor belongs to is stored as integers."""
        return (self.language if is_language(name) else self.vision) in ("int8", "int4")

    def rescales(self, name: str) -> bool:
        """Whether factors are applied to a tensor: both ends of one lie in the same part."""
        return self.quantises(name) and not self.options.naive

    def kind(self, name: str) -> Kind:
        """How a linear layer's weight is stored."""
        if not self.quantises(name):
            return "float"
        if stored_name(name).startswith(self.options.keep_fp16):
            return "fp16"
        return "blocks" if is_language(name) else "int8"

    @property
    def compensates(self) -> bool:
        """Whether the decoder is quantised by GPTQ: at 8 bits there is nothing to gain."""
        return self.language == "int4" and not self.options.naive

    def form(self, unit: str) -> BlockFormat | None:
        """Block format of a unit's linear layers; None is W8A8."""
        if unit == "head":
            return self.head_form
        return self.language_form if unit.startswith("language.") else None

    def block_form(self, name: str) -> BlockFormat:
        """Block format of a linear layer of the language model."""
        return self.head_form if name == HEAD else self.language_form

    def touches(self, unit: str) -> bool:
        """Whether anything in a unit is stored as integers."""
        if unit == "embed":
            return False
        if unit == "head" or unit.startswith("language."):
            cached = self.kv == "int8" and unit != "head"
            return cached or self.language in ("int8", "int4")
        return self.vision == "int8"

    @property
    def language_form(self) -> BlockFormat:
        bits = 8 if self.language == "int8" else 4
        return BlockFormat(bits, self.options.block, self.options.symmetric)

    @property
    def head_form(self) -> BlockFormat:
        """The head is read once a token and decides it: 8 bits unless fewer are asked for."""
        return BlockFormat(self.options.head_bits, self.options.block, self.options.symmetric)


def decide(
    groups: Sequence[Group],
    collector: Collector,
    source: FloatSource,
    form: BlockFormat | None,
    *,
    naive: bool = False,
    compensate: bool = False,
) -> Decisions:
    """Search every group of one unit; with `compensate`, quantise its weights by GPTQ as well.

    With `naive` there is nothing to search for: that takes two thirds of a true-width unit's time.
    """
    decisions: Decisions = {}
    chosen: list[tuple[Group, Floats]] = []
    for group in groups:
        stats = collector.stats(group.linears[0])
        weights = [_some_rows(source, name) for name in group.linears]
        if naive:
            choice = unsearched(stats, weights, form)
        else:
            choice = search(stats, weights, form, tie=group.tie)
        chosen.append((group, choice.factors))
        decisions |= record(group, stats.square, choice.factors, source)
        for name in group.linears:
            decisions[f"scale:{name}"] = np.array(choice.input_scale, np.float32)
            decisions[f"naive_scale:{name}"] = np.array(full_scale(stats.largest), np.float32)
            errors = [choice.error, choice.naive_error]
            decisions[f"error:{name}"] = np.array(errors, np.float32)
    if compensate and form is not None:
        for group, factors in chosen:
            spread = error_factors(collector.moments(group.linears[0]), factors)
            for name in group.linears:
                decisions |= _compensated(source, name, form, factors, spread, decisions)
    return decisions


def _compensated(
    source: FloatSource,
    name: str,
    form: BlockFormat,
    factors: Floats,
    spread: Sequence[Floats],
    decisions: Decisions,
) -> Decisions:
    """Quantise one matrix by GPTQ, runs of its rows in parallel.

    Rows scale after rounding as before it. They are taken as they are stored: nothing is held.
    """
    importance = decisions[f"square:{name}"]

    def quantize(run: Floats) -> Blocks:
        return gptq_blocks(run * factors, form, spread, importance=importance)

    done: list[Blocks] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for block in source.as_stored(name):
            wide = block.astype(np.float32)
            runs = [wide[i : i + GPTQ_ROWS] for i in range(0, len(wide), GPTQ_ROWS)]
            done += pool.map(quantize, runs)
    order = source.order(name)

    def ordered(runs: Sequence[NDArray[Any]]) -> NDArray[Any]:
        rows = np.concatenate(runs)
        return rows if order is None else rows[order]

    scales = ordered([run.scales for run in done])
    if (rows := decisions.get(f"row:{name}")) is not None:
        scales = scales * rows[:, np.newaxis]
    result = {
        f"packed:{name}": ordered([run.packed for run in done]),
        f"packed_scales:{name}": scales,
    }
    zeros = [run.zero_points for run in done if run.zero_points is not None]
    return result | ({f"packed_zeros:{name}": ordered(zeros)} if zeros else {})


def decide_experts(spec: LanguageSpec, layer: int) -> Decisions:
    """Return what is decided of a layer's experts: rounding to nearest, all inputs alike.

    At 4 bits `compensate_experts` rounds them by what each is given.
    """
    decisions: Decisions = {}
    for name in EXPERT_MATRICES if spec.has_experts(layer) else ():
        weight = f"{decoder_prefix(layer)}{name}.weight"
        columns = language_shapes(spec)[weight][1]
        decisions[f"scale:{weight}"] = np.zeros((), np.float32)
        decisions[f"square:{weight}"] = np.ones(columns, np.float32)
    return decisions


#: Range of the int8 cache over the largest size seen. Scales are fixed while prompts are not, and a
#: lane that is cut off loses more than a bit of all. Beside float caches, the logits of six layers
#: of true width with random weights keep a cosine of 0.974 at 1, 0.998 at 1.5, 0.9987 at 2, 0.996
#: at 3; tiny_ocr reads no worse (98.14, 98.17, 98.23, 98.08%).
CACHE_HEADROOM = np.float32(2)


def decide_cache(
    spec: LanguageSpec, layer: int, decisions: Decisions, key: Floats, value: Floats
) -> Decisions:
    """Scales of int8 keys and values from their largest sizes, `(kv_heads, head_dim)` each.

    Keys are scaled after the rotation, as GroupQueryAttention stores them. A loud lane then shares
    its range with the lane it rotates with. That costs 0.7 dB on tiny_ocr (SQNR of the keys of 24
    pictures, calibrated with 24 others: 40.6 dB, 41.3 before the rotation; 38.1 against 39.2 in the
    worst layer), and 0.2 to 1.6 dB on keys of 128 lanes of which 4 are 5 to 50 times as loud. Keys
    stored before it would all have to be rotated again in every step.
    """
    qkv = f"{decoder_prefix(layer)}qkv.weight"
    rescaled = value
    if (rows := decisions.get(f"row:{qkv}")) is not None:
        rescaled = value * rows[-spec.key_value_size :].reshape(value.shape)
    floor = np.float32(1e-6)
    sizes = {"key": key, "value": rescaled, "naive_value": value}
    return {
        f"{kind}:{layer}": (CACHE_HEADROOM * np.maximum(size, floor) / INT8_MAX).astype(np.float32)
        for kind, size in sizes.items()
    }


def make_plan(recipe: Recipe, decisions: Decisions) -> QuantPlan:
    """What the decisions mean for every weight under this recipe."""
    linears: dict[str, LinearPlan] = {}
    for key in decisions:
        kind, name = key.split(":", 1)
        if kind == "scale":
            linears[name] = _linear_plan(name, recipe, decisions)
    rescaled = {
        key: factors
        for key, factors in decisions.items()
        if key.startswith(("row:", "column:")) and recipe.rescales(key.split(":", 1)[1])
    }
    value = "value" if recipe.rescales(HEAD) else "naive_value"
    cache = {}
    if recipe.kv == "int8":
        for layer in (int(key[len("key:") :]) for key in decisions if key.startswith("key:")):
            cache[layer] = CacheScales(decisions[f"key:{layer}"], decisions[f"{value}:{layer}"])
    return QuantPlan(
        linears,
        {key[len("row:") :]: v for key, v in rescaled.items() if key.startswith("row:")},
        {key[len("column:") :]: v for key, v in rescaled.items() if key.startswith("column:")},
        cache,
        wide_linears(decisions),
    )


def _linear_plan(name: str, recipe: Recipe, decisions: Decisions) -> LinearPlan:
    factors = decisions.get(f"factors:{name}") if recipe.rescales(name) else None
    ratios = (1.0,) if recipe.options.naive else CLIP_RATIOS
    kind = recipe.kind(name)
    if kind in ("float", "fp16"):
        return LinearPlan(kind, input_factors=factors)
    if kind == "int8":
        scale = decisions[f"naive_scale:{name}" if recipe.options.naive else f"scale:{name}"]
        return LinearPlan(kind, input_scale=float(scale), input_factors=factors)
    importance = None if recipe.options.naive else decisions[f"square:{name}"]
    packed = None
    if recipe.compensates and f"packed:{name}" in decisions:
        packed = Blocks(
            decisions[f"packed:{name}"],
            decisions[f"packed_scales:{name}"],
            decisions.get(f"packed_zeros:{name}"),
        )
    form = recipe.block_form(name)
    return LinearPlan(kind, form=form, importance=importance, ratios=ratios, packed=packed)


def record(group: Group, square: Floats, factors: Floats, source: WeightSource) -> Decisions:
    """Where the factors go: into columns here and rows upstream, or an explicit product."""
    decisions: Decisions = {f"square:{name}": square / factors**2 for name in group.linears}
    if (factors == 1).all():
        return decisions
    for name in group.linears:
        decisions[f"column:{name}"] = factors
        if not group.upstream:
            decisions[f"factors:{name}"] = (1 / factors).astype(np.float32)
    known = tensor_shapes(source.spec)
    for upstream in group.upstream:
        if upstream.optional and upstream.name not in known:
            continue
        rows = np.ones(known[upstream.name][0], np.float32)
        rows[slice(None) if upstream.rows is None else upstream.rows] = 1 / factors
        decisions[f"row:{upstream.name}"] = rows
    return decisions


def _some_rows(source: FloatSource, name: str) -> Floats:
    """About `SEARCH_ROWS` rows spread over the matrix, float32."""
    step = max(1, source.shape(name)[0] // SEARCH_ROWS)
    parts, start = [], 0
    for block in source.as_stored(name):
        parts.append(block[-start % step :: step].astype(np.float32))
        start += len(block)
    return np.concatenate(parts)
