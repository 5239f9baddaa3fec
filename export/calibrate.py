"""Calibration: run the float model unit by unit over real inputs and decide the quantisation.

Only one unit is in memory at a time, and what it decided is saved before the next begins, so an
interrupted run resumes where it was. Each quantised unit is then run beside the float one on the
same inputs, which says what it costs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.export.checkpoint import WeightSource
from internvl_edge.export.decisions import (
    Decisions,
    Recipe,
    decide,
    decide_cache,
    make_plan,
)
from internvl_edge.export.mapping import TOK_EMBEDDINGS
from internvl_edge.export.observe import Collector, run_float, run_quantised
from internvl_edge.export.plan import RescaledSource
from internvl_edge.export.quantize import Floats
from internvl_edge.export.units import (
    KEY,
    NEXT,
    VALUE,
    Unit,
    embed_unit,
    head_unit,
    language_unit,
    projector_unit,
    vision_unit,
)
from internvl_edge.export.weights import WeightReader
from internvl_edge.runtime.contract import CachePrecision

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
    """

    def __init__(
        self,
        source: WeightSource,
        samples: Sequence[Sample],
        context_id: int,
        recipe: Recipe,
        store: Store,
        advance: Callable[[int], None],
    ) -> None:
        self._source = source
        self._samples = samples
        self._context_id = context_id
        self._recipe = recipe
        self._store = store
        self._advance = advance
        self._spec = source.spec

    def run(self) -> Decisions:
        """Decisions for the whole model, all units merged."""
        spec, language = self._spec, self._spec.language
        merged: Decisions = {}
        tiles = np.concatenate([sample.tiles for sample in self._samples])
        lengths = [len(sample.ids) for sample in self._samples]
        nothing = np.empty((0, 0), np.float32)
        x = self._step("embed", merged, lambda _: embed_unit(spec, tiles), nothing)
        for layer in range(spec.vision.layers_run):
            x = self._step(f"vision.{layer}", merged, partial(vision_unit, spec, layer), x)
        rows = self._step("projector", merged, partial(projector_unit, spec), x)
        x = self._sequences(rows)
        for layer in range(language.num_hidden_layers):
            make = partial(language_unit, language, layer, lengths=lengths)
            x = self._step(f"language.{layer}", merged, make, x)
        self._step("head", merged, partial(head_unit, language, lengths=lengths), x)
        return merged

    def _step(
        self, name: str, merged: Decisions, make: Callable[[Floats], Unit], x: Floats
    ) -> Floats:
        done = self._store.load(name)
        if done is None:
            self._store.save(name, *self._compute(make(x)))
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
        reader = WeightReader(self._source, "float32")
        results: list[Floats] = []
        sizes: dict[str, Floats] = {}
        for outputs in run_float(unit.build, unit.feeds("fp32"), reader, collector):
            results.append(outputs[NEXT])
            for part in (KEY, VALUE):
                if part in outputs:
                    largest = np.abs(outputs[part][0]).max(axis=1)
                    sizes[part] = np.maximum(sizes.get(part, largest), largest)
        form = self._recipe.form(unit.name)
        decisions = decide(unit.groups, collector, self._source, form, compensate=compensate)
        if sizes:
            decisions |= decide_cache(
                self._spec.language, layer, decisions, sizes[KEY], sizes[VALUE]
            )
        decisions |= self._compare(unit, decisions, results)
        return decisions, np.concatenate(results)

    def _compare(self, unit: Unit, decisions: Decisions, exact: Sequence[Floats]) -> Decisions:
        """SQNR in dB and cosine of the unit's output, quantised against float."""
        if not self._recipe.touches(unit.name):
            return {}
        plan = make_plan(self._recipe, decisions)
        reader = WeightReader(RescaledSource(self._source, plan), "float32")
        cache: CachePrecision = "int8" if plan.cache else "fp32"
        feeds = islice(unit.feeds(cache), COMPARED_RUNS)
        signal = noise = product = other = 0.0
        runs = run_quantised(unit.build, feeds, reader, plan, cache)
        for expected, outputs in zip(exact, runs, strict=False):
            got = outputs[NEXT].astype(np.float64)
            signal += float((expected.astype(np.float64) ** 2).sum())
            other += float((got**2).sum())
            noise += float(((got - expected) ** 2).sum())
            product += float((got * expected).sum())
        sqnr = 10 * np.log10(signal / max(noise, 1e-30))
        cosine = product / max(np.sqrt(signal * other), 1e-30)
        return {f"unit:{unit.name}": np.array([sqnr, cosine], np.float32)}

    def _sequences(self, rows: Floats) -> Floats:
        """Embeddings of all samples, one after another, image rows in place: `(tokens, hidden)`."""
        hidden = self._spec.language.hidden_size
        ids = np.concatenate([sample.ids for sample in self._samples])
        x = np.zeros((len(ids), hidden), np.float32)
        if not rows.size:  # a later unit is finished already: nobody reads this
            return x
        start = 0
        for block in self._source.blocks(TOK_EMBEDDINGS):
            found = (ids >= start) & (ids < start + len(block))
            x[found] = block[ids[found] - start]
            start += len(block)
        x[ids == self._context_id] = rows.reshape(-1, hidden)
        return x
