"""What ONNX Runtime is given to run the language graph once: for one sequence, or for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.kernels.attention.library import PLACE_FIELDS
from internvl_edge.runtime.backends import (
    MOST_SLICES,
    Slice,
    attention_nodes,
    several,
    single,
)
from internvl_edge.runtime.backends.attention_nodes import SEQUENCES
from internvl_edge.runtime.backends.ort_cache import OrtCache

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass(frozen=True)
class Pass:
    """What the language graph is given in one pass.

    Attributes:
        feeds: inputs by name, but for bound caches.
        logit_rows: how many rows want logits.
        cache: what is bound; None where the graph is told the addresses of caches.
    """

    feeds: dict[str, NDArray[Any]]
    logit_rows: int
    cache: OrtCache | None = None

    def bound(self, graph: ort.InferenceSession) -> ort.IOBinding:
        """Return a binding of all inputs of a graph, and of the cache as output."""
        binding = graph.io_binding() if self.cache is None else self.cache.binding(graph)
        for name, values in self.feeds.items():
            binding.bind_cpu_input(name, values)
        return binding


def language_pass(batch: Sequence[Slice], spec: LanguageSpec, attends: bool) -> Pass:
    """Return the pass over new rows of some sequences, each with an `OrtCache`.

    Args:
        attends: whether attention is our own kernel's, which takes several.

    Raises:
        LimitError: there are more than are taken, or none.
    """
    if not attends:
        return alone(single(batch))
    return joined(several(batch, MOST_SLICES), attention_nodes.takes_total(spec))


def alone(new: Slice) -> Pass:
    """Return the pass of one sequence, whose cache the graph binds."""
    cache = _cache(new)
    start = cache.state.length
    total = start + len(new.rows)
    cos, sin = cache.rope.tables(start, total, new.rope_theta)
    feeds = {
        contract.EMBEDDINGS: np.ascontiguousarray(new.rows),
        contract.ROPE_COS: cos,
        contract.ROPE_SIN: sin,
        contract.LAST_POSITION: np.array([total - 1], np.int32),
        contract.TOTAL_LENGTH: np.array(total, np.int32),
        contract.LOGIT_ROWS: new.logit_rows,
    }
    return Pass(feeds, len(new.logit_rows), cache)


def joined(batch: Sequence[Slice], takes_total: bool) -> Pass:
    """Return the pass of several sequences, for a graph whose attention is our own kernel's.

    Args:
        takes_total: see `attention_nodes.takes_total`.
    """
    caches = [_cache(one) for one in batch]
    places = np.empty((len(batch), PLACE_FIELDS + len(caches[0].addresses)), np.int64)
    cos: list[NDArray[np.floating]] = []
    sin: list[NDArray[np.floating]] = []
    logit_rows, first = [], 0
    for place, one, cache in zip(places, batch, caches, strict=True):
        start, count = cache.state.length, len(one.rows)
        place[:PLACE_FIELDS] = first, count, start, cache.state.capacity
        place[PLACE_FIELDS:] = cache.addresses
        tables = cache.rope.tables(start, start + count, one.rope_theta)
        for rows, table in zip((cos, sin), tables, strict=True):
            rows.append(table[start : start + count])
        logit_rows.append(one.logit_rows + first)
        first += count
    feeds = {
        contract.EMBEDDINGS: _stacked([one.rows for one in batch]),
        contract.ROPE_COS: _stacked(cos),
        contract.ROPE_SIN: _stacked(sin),
        contract.LOGIT_ROWS: _stacked(logit_rows),
        SEQUENCES: places,
    }
    if takes_total:
        feeds[contract.TOTAL_LENGTH] = np.array(first, np.int32)
    return Pass(feeds, len(feeds[contract.LOGIT_ROWS]))


def _cache(new: Slice) -> OrtCache:
    assert isinstance(new.cache, OrtCache)
    return new.cache


def _stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays one after the other; one alone is not copied."""
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)
