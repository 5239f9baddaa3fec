"""What ONNX Runtime is given to run the language graph once: for one sequence, or for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.kernels.attention.library import PLACE_FIELDS
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.attention_nodes import SEQUENCES
from internvl_edge.runtime.backends.ort_cache import OrtCache


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


def alone(new: Slice) -> Pass:
    """Return the pass of one sequence, whose cache the graph binds."""
    cache = new.cache
    assert isinstance(cache, OrtCache)
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
    caches = [one.cache for one in batch]
    places = np.empty((len(batch), PLACE_FIELDS + len(caches[0].addresses)), np.int64)
    cos, sin, logit_rows, first = [], [], [], 0
    for place, one in zip(places, batch, strict=True):
        cache, count = one.cache, len(one.rows)
        assert isinstance(cache, OrtCache)
        start = cache.state.length
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


def _stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays one after the other; one alone is not copied."""
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)
