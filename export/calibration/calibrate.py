"""Calibration: run the float model unit by unit over real inputs and decide the quantisation.

Only one unit is in memory at a time, and what it decided is saved before the next begins, so an
interrupted run resumes where it was. Each quantised unit is then run beside the float one on the
same inputs, which says what it costs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import CachePrecision
from internvl_edge.export.calibration.decisions import (
    Decisions,
    Recipe,
    decide,
    decide_cache,
    decide_experts,
    make_plan,
)
from internvl_edge.export.calibration.expert_gptq import compensate_experts
from internvl_edge.export.calibration.experts import ExpertInputs
from internvl_edge.export.calibration.observe import (
    HERE,
    Collector,
    Site,
    Watch,
    run_float,
    run_planned,
)
from internvl_edge.export.calibration.ranges import RangeCollector
from internvl_edge.export.calibration.units import (
    KEY,
    NEXT,
    VALUE,
    Unit,
    make_unit,
    unit_names,
)
from internvl_edge.export.checkpoint.checkpoint import FloatSource, WeightSource
from internvl_edge.export.checkpoint.names import EMBEDDING
from internvl_edge.export.checkpoint.weights import WeightReader
from internvl_edge.export.formats.plan import RescaledSource
from internvl_edge.export.formats.quantize import Floats

#: Runs over which a quantised unit is compared with the float one.
COMPARED_RUNS = 4


@dataclass(frozen=True)
class Sample:
    """One calibration sequence.

    Attributes:
        tiles: uint8 `(tiles, S, S, 3)` of all its images.
        ids: int64 `(tokens,)` with image slots expanded, answer included.
    """

    tiles: NDArray[np.uint8]
    ids: NDArray[np.int64]


class Store(Protocol):
    """Keeps what finished units decided and the activations the next one needs."""

    def load(self, unit: str) -> tuple[Decisions, Floats] | None: ...

    def save(self, unit: str, decisions: Decisions, activations: Floats) -> None: ...


class Calibration:
    """One pass over the model.

    Args:
        source: the float weights.
        samples: see `Sample`.
        context_id: token id of image slots.
        recipe: what is to be quantised, and how.
        store: for resuming.
        advance: called with 1 after each unit.
        site: where units run.
    """

    def __init__(
        self,
        source: FloatSource,
        samples: Sequence[Sample],
        context_id: int,
        recipe: Recipe,
        store: Store,
        advance: Callable[[int], None],
        site: Site = HERE,
    ) -> None:
        self._source = source
        self._samples = samples
        self._context_id = context_id
        self._recipe = recipe
        self._store = store
        self._advance = advance
        self._site = site
        self._spec = source.spec
        self._lengths = [len(sample.ids) for sample in samples]

    def run(self) -> Decisions:
        """Decisions for the whole model, all units merged."""
        merged: Decisions = {}
        x: NDArray[Any] = np.concatenate([sample.tiles for sample in self._samples])
        for name in unit_names(self._spec):
            x = self._step(name, merged, x)
            if name == "projector" and x.size:  # else a later unit is finished: nobody reads it
                tokens = embed_tokens(self._source, self._samples)
                x = place_rows(tokens, self._samples, x, self._context_id)
        return merged

    def _step(self, name: str, merged: Decisions, x: NDArray[Any]) -> Floats:
        done = self._store.load(name)
        if done is None:
            unit = make_unit(self._spec, name, x, self._lengths)
            self._store.save(name, *self._compute(unit))
            done = self._store.load(name)  # mapped from disk: a layer's arrays need not stay
        if done is None:
            raise AssertionError(f"{name} was saved but cannot be loaded")
        decisions, activations = done
        merged.update(decisions)
        self._advance(1)
        return activations

    def _compute(self, unit: Unit) -> tuple[Decisions, Floats]:
        layer = int(unit.name.rpartition(".")[2]) if "." in unit.name else 0
        compensate = unit.name.startswith("language.") and self._recipe.compensates
        collector = Collector(layer, with_moments=compensate)
        watch = Watch(
            collector,
            RangeCollector() if self._recipe.has_halves else None,
            ExpertInputs() if self._looks_inside(unit) else None,
        )
        reader = WeightReader(self._source, "float32")
        results: list[Floats] = []
        sizes: dict[str, Floats] = {}
        runs = run_float(unit.build, unit.feeds("fp32"), reader, watch, self._site)
        for outputs in runs:
            results.append(outputs[NEXT])
            for part in (KEY, VALUE):
                if part in outputs:
                    largest = np.abs(outputs[part][0]).max(axis=1)
                    sizes[part] = np.maximum(sizes.get(part, largest), largest)
        form = self._recipe.form(unit.name)
        naive = self._recipe.options.naive
        groups = unit.groups if self._recipe.touches(unit.name) else ()
        decisions = decide(
            groups, collector, self._source, form, naive=naive, compensate=compensate
        )
        decisions |= self._decide_experts(unit, layer, watch)
        if sizes:
            decisions |= decide_cache(
                self._spec.language, layer, decisions, sizes[KEY], sizes[VALUE]
            )
        decisions |= watch.ranges.decisions() if watch.ranges else {}
        decisions |= self._compare(unit, decisions, results)
        return decisions, np.concatenate(results)

    def _looks_inside(self, unit: Unit) -> bool:
        """Whether it counts what the experts of a decoder layer compute, if it has any."""
        recipe = self._recipe
        wanted = recipe.compensates or recipe.computes_in_float16(EMBEDDING)
        return wanted and unit.name.startswith("language.")

    def _decide_experts(self, unit: Unit, layer: int, watch: Watch) -> Decisions:
        """What is decided of a layer's experts; nothing where it has none."""
        if not unit.name.startswith("language."):
            return {}
        decisions = decide_experts(self._spec.language, layer)
        if watch.experts is None:
            return decisions
        if self._recipe.compensates:
            return decisions | compensate_experts(watch.experts, self._recipe.language_form)
        if watch.ranges is not None:
            watch.experts.measure(watch.ranges)
        return decisions

    def _compare(self, unit: Unit, decisions: Decisions, exact: Sequence[Floats]) -> Decisions:
        """SQNR in dB and cosine of the unit's output, quantised against float."""
        if not self._recipe.touches(unit.name):
            return {}
        plan = make_plan(self._recipe, decisions)
        reader = WeightReader(RescaledSource(self._source, plan), "float32")
        cache: CachePrecision = "int8" if plan.cache else "fp32"
        feeds = islice(unit.feeds(cache), COMPARED_RUNS)
        signal = noise = product = other = 0.0
        site = replace(self._site, device="cpu")
        runs = run_planned(unit.build, feeds, reader, plan, cache, site)
        for expected, outputs in zip(exact, runs, strict=False):
            got = outputs[NEXT].astype(np.float64)
            signal += float((expected.astype(np.float64) ** 2).sum())
            other += float((got**2).sum())
            noise += float(((got - expected) ** 2).sum())
            product += float((got * expected).sum())
        sqnr = 10 * np.log10(signal / max(noise, 1e-30))
        cosine = product / max(np.sqrt(signal * other), 1e-30)
        return {f"unit:{unit.name}": np.array([sqnr, cosine], np.float32)}


def embed_tokens(source: WeightSource, samples: Sequence[Sample]) -> Floats:
    """Embeddings of all samples' tokens, one sample after another: `(tokens, hidden)`."""
    ids = np.concatenate([sample.ids for sample in samples])
    x = np.zeros((len(ids), source.spec.language.hidden_size), np.float32)
    start = 0
    for block in source.blocks(EMBEDDING):
        found = (ids >= start) & (ids < start + len(block))
        x[found] = block[ids[found] - start]
        start += len(block)
    return x


def place_rows(tokens: Floats, samples: Sequence[Sample], rows: Floats, context_id: int) -> Floats:
    """`tokens` with the image rows of all samples in their slots."""
    ids = np.concatenate([sample.ids for sample in samples])
    placed = tokens.copy()
    placed[ids == context_id] = rows.reshape(-1, tokens.shape[1])
    return placed
