"""Sequences that share passes on a GPU: models, caches with something in them, and what is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.cuda_passes import Layout
from internvl_edge.runtime.decoding.passes import Run

SEQUENCES, CONTEXT = 3, 700


def load(path: Path, **options: Any) -> InternVL:
    """Keeps nothing between prompts, so that each computes everything."""
    given = {"max_sequences": SEQUENCES, "max_context": CONTEXT, "reuse_bytes": 0}
    return InternVL.load(path, device="cuda", threads=2, **{**given, **options})


def caches(model: InternVL, lengths: list[int]) -> list[Any]:
    """Caches with so many positions filled, in neighbouring slots."""
    made = [model.engine.backend.new_cache(CONTEXT) for _ in lengths]
    for number, (cache, length) in enumerate(zip(made, lengths, strict=True)):
        if ids := [5 + (number + place) % 400 for place in range(length)]:
            model.engine.run([new_run(model, cache, ids)])
    return made


def new_run(model: InternVL, cache: Any, ids: list[int], count: int = 0) -> Run:
    array = np.array(ids, np.int64)
    base = model.spec.language.rope_theta
    return Run(cache, array, array, base, np.array([len(ids) - 1]), count)


def held(cache: Any) -> NDArray[Any]:
    """Keys and values `(2 * layers, kv_heads, context, head_dim)`."""
    return cache.slot.storage.memory.to_host()[:, cache.slot.index]


def noted_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note of how many sequences each pass is, from now on."""
    found: list[int] = []
    of = Layout.of

    def counted(parts: Sequence[Slice]) -> Layout:
        layout = of(parts)
        found.append(layout.count)
        return layout

    monkeypatch.setattr(Layout, "of", counted)
    return found


def check_between(model: InternVL) -> None:
    """Check that a slot between those that are run keeps what it holds."""
    first, idle, last = caches(model, [40, 7, 3])
    assert [cache.slot.index for cache in (first, idle, last)] == [0, 1, 2]
    before = [held(cache) for cache in (first, idle, last)]
    model.engine.run([new_run(model, cache, [9]) for cache in (last, first)])
    for cache, old, length in zip((first, idle, last), before, (40, 7, 3), strict=True):
        changed = np.flatnonzero((held(cache) != old).any(axis=(0, 1, 3)))
        assert set(changed) <= {length}
    alone = model.engine.backend.new_cache(CONTEXT)  # in a storage of one
    model.engine.run([new_run(model, alone, list(range(6, 13)))])
    got, wanted = (model.engine.decode(cache, 8) for cache in (idle, alone))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def check_candidates(model: InternVL) -> None:
    """Check that candidates are a row's largest logits beside another sequence, and with all logits
    beside some."""
    pair, same_pair = caches(model, [60, 9]), caches(model, [60, 9])
    for token, count in ((5, 1), (6, 3), (7, 64), (8, 0), (9, 2)):
        chosen = model.engine.run([new_run(model, cache, [token], count) for cache in pair])
        for (found,), other in zip(chosen, same_pair, strict=True):
            logits = model.engine.decode(other, token)
            ids = np.arange(len(logits)) if found.ids is None else found.ids
            np.testing.assert_allclose(found.logits, logits[ids], atol=1e-5)
            assert int(ids[found.logits.argmax()]) == int(logits.argmax())


def check_slots(bindings: HostDriver, model: InternVL) -> None:
    """Check that a slot serves the next cache, and that more have memory of their own."""
    new = model.engine.backend.new_cache
    held_ones: list[Any] = [new(8) for _ in range(SEQUENCES)]
    memory = len(bindings.memory)
    more: list[Any] = [new(8), new(8)]
    assert [cache.slot.storage.slots for cache in (*held_ones, *more)] == [3, 3, 3, 1, 1]
    del more[0]
    del held_ones[1]
    again: Any = new(8)
    assert (again.slot.storage.slots, again.slot.index) == (3, 1)
    del more, again, held_ones
    assert len(bindings.memory) == memory
