"""The model in units that fit in memory one at a time, each a graph with inputs and outputs.

A unit is one transformer layer, the patch embedding, the projector or the head. Its output is
called "next": what the following unit starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision, Tensor
from internvl_edge.bundle.rope import rope_base, rope_rows
from internvl_edge.bundle.specs import LanguageSpec, ModelSpec
from internvl_edge.export.calibration.groups import (
    Group,
    head_groups,
    language_groups,
    projector_groups,
    vision_groups,
)
from internvl_edge.export.calibration.observe import Feeds
from internvl_edge.export.checkpoint.weights import WeightReader
from internvl_edge.export.formats.quantize import Floats
from internvl_edge.export.graphs.dialects import Dialect
from internvl_edge.export.graphs.language import decoder_layer, head
from internvl_edge.export.graphs.vision import embed_tiles, encoder_layer, project

#: Tiles run at a time.
TILE_BATCH = 4
#: Rows of each sequence, from its end, whose inputs to the head are looked at.
HEAD_ROWS = 64
X, NEXT, KEY, VALUE = "x", "next", "key", "value"


@dataclass(frozen=True)
class Unit:
    """One part of the model.

    Attributes:
        build: writes the part, with its inputs and outputs, for a precision of the KV cache.
        feeds: the inputs of every run, anew for each pass.
        groups: its linear layers; none where nothing is quantised.
    """

    name: str
    build: Callable[[Dialect, WeightReader, CachePrecision], None]
    feeds: Callable[[CachePrecision], Iterator[Feeds]]
    groups: Sequence[Group] = ()


def unit_names(spec: ModelSpec) -> list[str]:
    """All units in the order they run."""
    return [
        "embed",
        *(f"vision.{layer}" for layer in range(spec.vision.layers_run)),
        "projector",
        *(f"language.{layer}" for layer in range(spec.language.num_hidden_layers)),
        "head",
    ]


def make_unit(spec: ModelSpec, name: str, x: NDArray[Any], lengths: Sequence[int]) -> Unit:
    """The unit of that name on the output `x` of the one before it.

    Args:
        x: for "embed" the tiles; for the first decoder layer the sequences, image rows in place.
        lengths: tokens of each sequence.
    """
    part, _, layer = name.partition(".")
    if part == "embed":
        return embed_unit(spec, x)
    if part == "vision":
        return vision_unit(spec, int(layer), x)
    if part == "projector":
        return projector_unit(spec, x)
    if part == "language":
        return language_unit(spec.language, int(layer), x, lengths)
    return head_unit(spec.language, x, lengths)


def embed_unit(spec: ModelSpec, tiles: NDArray[np.uint8]) -> Unit:
    """uint8 `(tiles, S, S, 3)` -> `(tiles * sequence_length, vision hidden)`."""

    def build(dialect: Dialect, reader: WeightReader, _: CachePrecision) -> None:
        value = embed_tiles(spec.vision, dialect, reader)
        dialect.graph.output(value, _rows(NEXT, spec.vision.hidden_size))

    def feeds(_: CachePrecision) -> Iterator[Feeds]:
        for start in range(0, len(tiles), TILE_BATCH):
            yield {contract.TILES: tiles[start : start + TILE_BATCH]}

    return Unit("embed", build, feeds)


def vision_unit(spec: ModelSpec, layer: int, x: Floats) -> Unit:
    """One encoder layer on `(tiles * sequence_length, vision hidden)`."""

    def build(dialect: Dialect, reader: WeightReader, _: CachePrecision) -> None:
        value = dialect.graph.input(_rows(X, spec.vision.hidden_size))
        value = encoder_layer(spec.vision, dialect, reader, layer, value)
        dialect.graph.output(value, _rows(NEXT, spec.vision.hidden_size))

    groups = vision_groups(spec.vision, layer)
    return Unit(f"vision.{layer}", build, _tile_feeds(spec, x), groups)


def projector_unit(spec: ModelSpec, x: Floats) -> Unit:
    """The tower's output -> `(tiles, tokens_per_tile, language hidden)`."""

    def build(dialect: Dialect, reader: WeightReader, _: CachePrecision) -> None:
        value = dialect.graph.input(_rows(X, spec.vision.hidden_size))
        value = project(spec, dialect, reader, value)
        shape = ("tiles", "tokens", spec.language.hidden_size)
        dialect.graph.output(value, Tensor(NEXT, "float32", shape))

    return Unit("projector", build, _tile_feeds(spec, x), projector_groups())


def language_unit(spec: LanguageSpec, layer: int, x: Floats, lengths: Sequence[int]) -> Unit:
    """One decoder layer on sequences of these lengths, one after another in `(tokens, hidden)`."""

    def build(dialect: Dialect, reader: WeightReader, cache: CachePrecision) -> None:
        graph = dialect.graph
        graph.input(_rows(X, spec.hidden_size))
        own = (contract.past_key(layer), contract.past_value(layer))
        for tensor in contract.language_inputs(spec, "fp32", cache):
            if tensor.name in (*own, *_SHARED_INPUTS):
                graph.input(tensor)
        step = decoder_layer(spec, dialect, reader, layer, X, "")
        total = graph.node("Add", [step.hidden, step.residual], NEXT)
        graph.output(total, _rows(NEXT, spec.hidden_size))
        shape = (1, spec.num_key_value_heads, "context", spec.head_dim)
        graph.output(step.key, Tensor(KEY, contract.CACHE_DTYPE[cache], shape))
        graph.output(step.value, Tensor(VALUE, contract.CACHE_DTYPE[cache], shape))

    def feeds(cache: CachePrecision) -> Iterator[Feeds]:
        for start, stop in pairwise(_bounds(lengths)):
            tokens = stop - start
            cos, sin = rope_rows(spec, rope_base(spec, tokens), 0, tokens)
            empty = np.zeros(contract.cache_shape(spec, tokens), contract.CACHE_DTYPE[cache])
            yield {
                X: x[start:stop],
                contract.ROPE_COS: cos.astype(np.float32),
                contract.ROPE_SIN: sin.astype(np.float32),
                contract.LAST_POSITION: np.array([tokens - 1], np.int32),
                contract.TOTAL_LENGTH: np.array(tokens, np.int32),
                contract.past_key(layer): empty,
                contract.past_value(layer): empty,
            }

    return Unit(f"language.{layer}", build, feeds, language_groups(spec, layer))


def head_unit(spec: LanguageSpec, x: Floats, lengths: Sequence[int]) -> Unit:
    """Final norm and output matrix, on the last rows of each sequence: logits `(rows, vocab)`."""

    def build(dialect: Dialect, reader: WeightReader, _: CachePrecision) -> None:
        graph = dialect.graph
        graph.input(Tensor(X, "float32", ("tokens", spec.hidden_size)))
        graph.input(Tensor(contract.LOGIT_ROWS, "int64", ("rows",)))
        logits = head(spec, dialect, reader, X, "")
        graph.output(logits, _rows(NEXT, spec.vocab_size))

    def feeds(_: CachePrecision) -> Iterator[Feeds]:
        for start, stop in pairwise(_bounds(lengths)):
            last = np.arange(max(0, stop - start - HEAD_ROWS), stop - start)
            yield {X: x[start:stop], contract.LOGIT_ROWS: last}

    return Unit("head", build, feeds, head_groups())


_SHARED_INPUTS = (
    contract.ROPE_COS,
    contract.ROPE_SIN,
    contract.LAST_POSITION,
    contract.TOTAL_LENGTH,
)


def _rows(name: str, width: int) -> Tensor:
    return Tensor(name, "float32", ("rows", width))


def _tile_feeds(spec: ModelSpec, x: Floats) -> Callable[[CachePrecision], Iterator[Feeds]]:
    """Runs of whole tiles of `(tiles * sequence_length, hidden)`."""
    step = TILE_BATCH * spec.vision.sequence_length

    def feeds(_: CachePrecision) -> Iterator[Feeds]:
        for start in range(0, len(x), step):
            yield {X: x[start : start + step]}

    return feeds


def _bounds(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]
