"""Tokens to choose from, beside all the logits of the same step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.passes import Engine


def check_candidates(
    engine: Engine, all_of: Cache, some_of: Cache, steps: Iterable[tuple[int, int]]
) -> None:
    """Append `(token, count)` to two equal caches: the candidates are the largest logits."""
    for token, count in steps:
        logits = engine.decode(all_of, token)
        found = engine.decode_candidates(some_of, token, count)
        ids = np.arange(len(logits)) if found.ids is None else found.ids
        np.testing.assert_array_equal(found.logits, logits[ids])
        if count == 1:
            assert ids.tolist() == [logits.argmax()]
        needed = np.flatnonzero(logits >= np.sort(logits)[-count])
        assert count == 1 or set(needed) <= set(ids)
        assert all(np.diff(ids) > 0)
