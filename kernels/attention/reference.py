"""Attention as it is defined, in float64: what the kernel's paths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.attention.library import CachedSequence, Rows


def attend(rows: Rows, sequences: Sequence[CachedSequence]) -> NDArray[np.float64]:
    """Attend as `AttentionLibrary.attend` does, over caches whose new rows are written."""
    query = rotated(rows.query, rows.cos, rows.sin)
    group = query.shape[1] // rows.key.shape[1]
    out, first = np.empty(query.shape), 0
    for one in sequences:
        total = one.cached + one.rows
        keys, values = (
            np.repeat(scaled(cached[:, :total], scales), group, axis=0)
            for cached, scales in ((one.keys, rows.key_scales), (one.values, rows.value_scales))
        )
        new = slice(first, first + one.rows)
        scores = np.einsum("rhd,hkd->hrk", query[new], keys) / np.sqrt(query.shape[2])
        seen = np.arange(total) <= np.arange(one.cached, total)[:, np.newaxis]
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[new] = np.einsum("hrk,hkd->rhd", weights, values)
        first += one.rows
    return out


def rotated(
    heads: NDArray[np.floating],
    cos: NDArray[np.floating] | None,
    sin: NDArray[np.floating] | None,
) -> NDArray[np.float64]:
    """Turn both halves of each head `(rows, heads, head)` by the angles of its row."""
    wide = heads.astype(np.float64)
    if cos is None or sin is None:
        return wide
    a, b = np.split(wide, 2, axis=-1)
    c, s = (table.astype(np.float64)[:, np.newaxis] for table in (cos, sin))
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def scaled(cached: NDArray[np.generic], scales: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Return cached heads `(kv_heads, positions, head)` as numbers."""
    wide = cached.astype(np.float64)
    return wide if scales is None else wide * scales.astype(np.float64)[:, np.newaxis]
