"""What each unit does to the answer: KL divergence of the logits with only that unit quantised.

All variants of the model (the float one, and one per quantised unit) go through it together, unit
by unit: every variant through the float unit, and the float variant through the quantised one as
well, which begins the next variant. So no layer is held longer than in calibration, no bundle is
written, and the work grows with the square of the number of units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import CachePrecision
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.calibrate import Sample, embed_tokens, place_rows
from internvl_edge.export.calibration.decisions import Decisions, Recipe, make_plan
from internvl_edge.export.calibration.observe import HERE, Site, run_planned
from internvl_edge.export.calibration.units import NEXT, Unit, make_unit, unit_names
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import is_language, tensor_shapes
from internvl_edge.export.checkpoint.weights import WeightReader
from internvl_edge.export.formats.plan import QuantPlan, RescaledSource
from internvl_edge.export.formats.quantize import Floats

#: Calibration sequences looked at, at most, and bytes all variants' activations may take.
SEQUENCES = 8
MOST_BYTES = 1 << 30
#: Multiply-adds up to which the divergences are measured without being asked for: about a minute
#: on four cores. With the generator's pictures tiny_ocr takes 3e10 (0.4 s beside 3 s of
#: calibration), the family's 2B models 2e14, InternVL 1.5 6e14.
AFFORDABLE = 1e13

FLOAT = QuantPlan()


def unit_divergences(
    source: WeightSource,
    recipe: Recipe,
    decisions: Decisions,
    samples: Sequence[Sample],
    context_id: int,
    advance: Callable[[int], None],
    site: Site = HERE,
) -> Decisions:
    """Mean KL(float || one unit quantised) in nats over the last rows of the sequences.

    The rows are those calibration shows to the head (`units.HEAD_ROWS` of each sequence). A later
    unit is float and reads what the quantised one made; a quantised KV cache counts to its layer.

    Args:
        samples: see `chosen_samples`.
        advance: called with 1 after each unit.
        site: where units run.

    Returns:
        "divergence:<unit>" -> float32 scalar, for every unit the recipe touches.
    """
    spec = source.spec
    plan = make_plan(recipe, decisions)
    floats = WeightReader(source, "float32")
    quantised = WeightReader(RescaledSource(source, plan), "float32")
    lengths = [len(sample.ids) for sample in samples]
    names: list[str] = []
    x: NDArray[Any] = np.concatenate([sample.tiles for sample in samples])

    def outputs(name: str, x: NDArray[Any]) -> Iterator[Floats]:
        """Of every run: all variants through the float unit, then the first quantised."""
        copies = 1 + len(names)
        whole = make_unit(spec, name, x, lengths * copies)
        yield from _outputs(whole, floats, FLOAT, site)
        if recipe.touches(name):
            first = make_unit(spec, name, x[: len(x) // copies], lengths)
            yield from _outputs(first, quantised, plan, replace(site, device="cpu"))

    for name in unit_names(spec):
        if name == "head":
            touched = [*names, name] if recipe.touches(name) else names
            return _divergences(touched, outputs(name, x), len(samples))
        results = list(outputs(name, x))
        x = np.empty(0)  # before there is another copy
        x = np.concatenate(results)
        if recipe.touches(name):
            names.append(name)
        if name == "projector":
            tokens = embed_tokens(source, samples)
            variants = np.split(x, 1 + len(names))
            x = np.concatenate([place_rows(tokens, samples, v, context_id) for v in variants])
        advance(1)
    raise AssertionError("a model ends with its head")


def divergence(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Mean KL(exact || got) in nats over rows of logits `(rows, vocab)`."""
    p, q = _log_softmax(exact), _log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def chosen_samples(spec: ModelSpec, samples: Sequence[Sample], context_id: int) -> list[Sample]:
    """The first sequences whose activations fit `MOST_BYTES` in all variants.

    Where none does, the shortest with its picture's thumbnail only.
    """
    chosen: list[Sample] = []
    for sample in samples:
        fits = _activation_bytes(spec, [*chosen, sample]) <= MOST_BYTES
        if fits and len(chosen) < SEQUENCES:
            chosen.append(sample)
    shortest = min(samples, key=lambda sample: len(sample.ids))
    return chosen or [_last_tile(spec, shortest, context_id)]


def _last_tile(spec: ModelSpec, sample: Sample, context_id: int) -> Sample:
    slots = np.flatnonzero(sample.ids == context_id)
    return Sample(sample.tiles[-1:], np.delete(sample.ids, slots[spec.vision.tokens_per_tile :]))


def multiply_adds(spec: ModelSpec, samples: Sequence[Sample]) -> float:
    """About as many as all variants take: half of a part's units come before each of its own."""
    tiles = sum(len(sample.tiles) for sample in samples)
    tokens = sum(len(sample.ids) for sample in samples)
    vision, language = spec.vision.layers_run, spec.language.num_hidden_layers
    total = 0.0
    for name, shape in tensor_shapes(spec).items():
        if len(shape) != 2:
            continue
        if is_language(name):
            total += tokens * shape[0] * shape[1] * (vision + language / 2)
        else:
            total += tiles * spec.vision.sequence_length * shape[0] * shape[1] * vision / 2
    return total


def _activation_bytes(spec: ModelSpec, samples: Sequence[Sample]) -> int:
    """Between two units, with as many variants as there are before the head."""
    tiles = sum(len(sample.tiles) for sample in samples)
    tokens = sum(len(sample.ids) for sample in samples)
    vision, language = spec.vision, spec.language
    tower = tiles * vision.sequence_length * vision.hidden_size * (2 + vision.layers_run)
    decoder = tokens * language.hidden_size * len(unit_names(spec))
    return 4 * max(tower, decoder)


def _outputs(unit: Unit, reader: WeightReader, plan: QuantPlan, site: Site) -> Iterator[Floats]:
    cache: CachePrecision = "int8" if plan.cache else "fp32"
    for outputs in run_planned(unit.build, unit.feeds(cache), reader, plan, cache, site):
        yield outputs[NEXT]


def _divergences(names: Sequence[str], runs: Iterator[Floats], sequences: int) -> Decisions:
    """From logits of every variant's sequences in turn; only the float ones are held."""
    exact = [next(runs) for _ in range(sequences)]
    rows = sum(len(logits) for logits in exact)
    found: Decisions = {}
    for name in names:
        total = sum(divergence(logits, next(runs)) * len(logits) for logits in exact)
        found[f"divergence:{name}"] = np.array(total / rows, np.float32)
    return found


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
