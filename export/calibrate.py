"""Calibration: run the float model unit by unit over real inputs and decide the quantisation.

A unit is one transformer layer, the patch embedding, the projector or the head. Only one is in
memory at a time, and what it decided is saved before the next begins, so an interrupted run
resumes where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.export.checkpoint import WeightSource
from internvl_edge.export.decisions import Decisions, Recipe, decide, decide_cache
from internvl_edge.export.groups import (
    head_groups,
    language_groups,
    projector_groups,
    vision_groups,
)
from internvl_edge.export.language import decoder_layer, head
from internvl_edge.export.mapping import TOK_EMBEDDINGS
from internvl_edge.export.observe import Arrays, Collector, Feeds, ObservingDialect, run_unit
from internvl_edge.export.quantize import Floats
from internvl_edge.export.vision import embed_tiles, encoder_layer, project
from internvl_edge.export.weights import WeightReader
from internvl_edge.runtime import contract
from internvl_edge.runtime.contract import Tensor
from internvl_edge.runtime.rope import rope_base, rope_rows

#: Tiles run at a time.
TILE_BATCH = 4
#: Rows of each sequence, from its end, whose inputs to the head are looked at.
HEAD_ROWS = 64


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
        self._reader = WeightReader(source, "float32")
        self._spec = source.spec

    def run(self) -> Decisions:
        """Decisions for the whole model, all units merged."""
        vision, language = self._spec.vision, self._spec.language
        merged: Decisions = {}
        tiles = np.concatenate([sample.tiles for sample in self._samples])
        x = self._unit("embed", merged, partial(self._embed, tiles))
        for layer in range(vision.layers_run):
            x = self._unit(f"vision.{layer}", merged, partial(self._vision_layer, layer, x))
        rows = self._unit("projector", merged, partial(self._project, x))
        x = self._unit("embeddings", merged, partial(self._sequences, rows))
        for layer in range(language.num_hidden_layers):
            x = self._unit(f"language.{layer}", merged, partial(self._language_layer, layer, x))
        self._unit("head", merged, partial(self._head, x))
        return merged

    def _unit(
        self, name: str, merged: Decisions, compute: Callable[[], tuple[Decisions, Floats]]
    ) -> Floats:
        done = self._store.load(name)
        if done is None:
            self._store.save(name, *compute())
            done = self._store.load(name)  # mapped from disk: a layer's arrays need not stay
        if done is None:
            raise AssertionError(f"{name} was saved but cannot be loaded")
        decisions, activations = done
        merged.update(decisions)
        self._advance(1)
        return activations

    def _embed(self, tiles: NDArray[np.uint8]) -> tuple[Decisions, Floats]:
        def build(dialect: ObservingDialect) -> None:
            x = embed_tiles(self._spec.vision, dialect, self._reader)
            dialect.graph.output(x, self._tower_tensor("next"))

        return {}, self._run_tower(build, contract.TILES, tiles, Collector(0))

    def _vision_layer(self, layer: int, x: Floats) -> tuple[Decisions, Floats]:
        def build(dialect: ObservingDialect) -> None:
            value = dialect.graph.input(self._tower_tensor("x"))
            value = encoder_layer(self._spec.vision, dialect, self._reader, layer, value)
            dialect.graph.output(value, self._tower_tensor("next"))

        collector = Collector(layer)
        result = self._run_tower(build, "x", x, collector)
        groups = vision_groups(self._spec.vision, layer)
        return decide(groups, collector, self._source, self._recipe.vision_form), result

    def _project(self, x: Floats) -> tuple[Decisions, Floats]:
        def build(dialect: ObservingDialect) -> None:
            value = dialect.graph.input(self._tower_tensor("x"))
            value = project(self._spec, dialect, self._reader, value)
            shape = ("tiles", "tokens", self._spec.language.hidden_size)
            dialect.graph.output(value, Tensor("next", "float32", shape))

        collector = Collector(0)
        result = self._run_tower(build, "x", x, collector)
        groups = projector_groups()
        return decide(groups, collector, self._source, self._recipe.vision_form), result

    def _sequences(self, rows: Floats) -> tuple[Decisions, Floats]:
        """Embeddings of all samples, one after another, image rows in place: `(tokens, hidden)`."""
        hidden = self._spec.language.hidden_size
        ids = np.concatenate([sample.ids for sample in self._samples])
        x = np.zeros((len(ids), hidden), np.float32)
        start = 0
        for block in self._source.blocks(TOK_EMBEDDINGS):
            found = (ids >= start) & (ids < start + len(block))
            x[found] = block[ids[found] - start]
            start += len(block)
        x[ids == self._context_id] = rows.reshape(-1, hidden)
        return {}, x

    def _language_layer(self, layer: int, x: Floats) -> tuple[Decisions, Floats]:
        language = self._spec.language
        hidden = Tensor("x", "float32", ("tokens", language.hidden_size))
        wanted = {contract.past_key(layer), contract.past_value(layer)}

        def build(dialect: ObservingDialect) -> None:
            graph = dialect.graph
            graph.input(hidden)
            for tensor in contract.language_inputs(language, "fp32", "fp32"):
                per_layer = tensor.name.startswith("past.")
                if tensor.name in wanted or not (
                    per_layer or tensor.name in (contract.EMBEDDINGS, contract.LOGIT_ROWS)
                ):
                    graph.input(tensor)
            step = decoder_layer(language, dialect, self._reader, layer, hidden.name, "")
            total = graph.node("Add", [step.hidden, step.residual], "next")
            graph.output(total, Tensor("next", "float32", hidden.shape))
            shape = ("batch", language.num_key_value_heads, "context", language.head_dim)
            graph.output(step.key, Tensor("key", "float32", shape))
            graph.output(step.value, Tensor("value", "float32", shape))

        collector = Collector(layer, with_moments=self._recipe.compensates)
        result = np.empty_like(x)
        largest = [np.zeros((language.num_key_value_heads, language.head_dim), np.float32)] * 2
        bounds = self._bounds()

        def consume(index: int, outputs: Arrays) -> None:
            result[bounds[index] : bounds[index + 1]] = outputs["next"]
            for part, name in enumerate(("key", "value")):
                largest[part] = np.maximum(largest[part], np.abs(outputs[name][0]).max(axis=1))

        run_unit(build, self._language_feeds(layer, x), collector, consume)
        groups = language_groups(language, layer)
        decisions = decide(
            groups,
            collector,
            self._source,
            self._recipe.language_form,
            compensate=self._recipe.compensates,
        )
        decisions.update(decide_cache(language, layer, decisions, largest[0], largest[1]))
        return decisions, result

    def _head(self, x: Floats) -> tuple[Decisions, Floats]:
        language = self._spec.language
        hidden = Tensor("x", "float32", ("tokens", language.hidden_size))
        rows = Tensor(contract.LOGIT_ROWS, "int64", ("rows",))

        def build(dialect: ObservingDialect) -> None:
            dialect.graph.input(hidden)
            dialect.graph.input(rows)
            logits = head(language, dialect, self._reader, hidden.name, "")
            dialect.graph.output(logits, Tensor("next", "float32", ("rows", language.vocab_size)))

        # The last rows of each sequence: what generation will ask of the head.
        bounds = self._bounds()
        feeds: list[Feeds] = []
        for start, stop in pairwise(bounds):
            last = np.arange(max(0, stop - start - HEAD_ROWS), stop - start)
            feeds.append({"x": x[start:stop], contract.LOGIT_ROWS: last})
        collector = Collector(0)
        run_unit(build, feeds, collector, lambda index, outputs: None)
        groups = head_groups()
        decisions = decide(groups, collector, self._source, self._recipe.head_form)
        return decisions, np.empty((0, 0), np.float32)

    def _run_tower(
        self,
        build: Callable[[ObservingDialect], None],
        name: str,
        x: NDArray[np.generic],
        collector: Collector,
    ) -> Floats:
        """Run a vision unit over all tiles; `x` has one entry per tile."""
        results: list[Floats] = []
        width = self._spec.vision.hidden_size

        def batches() -> Iterator[Feeds]:
            for start in range(0, len(x), TILE_BATCH):
                batch = x[start : start + TILE_BATCH]
                yield {name: batch if name == contract.TILES else batch.reshape(-1, width)}

        def consume(index: int, outputs: Arrays) -> None:
            tiles = len(x[index * TILE_BATCH : (index + 1) * TILE_BATCH])
            results.append(outputs["next"].reshape(tiles, -1).astype(np.float32, copy=False))

        run_unit(build, batches(), collector, consume)
        return np.concatenate(results)

    def _tower_tensor(self, name: str) -> Tensor:
        return Tensor(name, "float32", ("rows", self._spec.vision.hidden_size))

    def _bounds(self) -> list[int]:
        return [0, *np.cumsum([len(sample.ids) for sample in self._samples]).tolist()]

    def _language_feeds(self, layer: int, x: Floats) -> Iterator[Feeds]:
        language = self._spec.language
        bounds = self._bounds()
        for start, stop in pairwise(bounds):
            tokens = stop - start
            cos, sin = rope_rows(language, rope_base(language, tokens), 0, tokens)
            empty = np.zeros(contract.cache_shape(language, tokens), np.float32)
            yield {
                "x": x[start:stop],
                contract.ROPE_COS: cos.astype(np.float32),
                contract.ROPE_SIN: sin.astype(np.float32),
                contract.LAST_POSITION: np.array([tokens - 1], np.int32),
                contract.TOTAL_LENGTH: np.array(tokens, np.int32),
                contract.past_key(layer): empty,
                contract.past_value(layer): empty,
            }
