"""Several sequences in a pass of `device="cuda"`, with the stand-in: each answered as alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver
from many import ASKED, alone, same
from side_by_side import (
    CONTEXT,
    caches,
    check_between,
    check_candidates,
    check_slots,
    held,
    load,
    new_run,
    noted_sizes,
)

from internvl_edge.kernels.device import Driver
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.cuda_passes import Layout
from internvl_edge.runtime.backends.slots import together

WAITS = ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")


@pytest.fixture
def model(bindings: HostDriver, golden_bundle: Path) -> InternVL:
    return load(golden_bundle)


@pytest.fixture
def one_by_one(bindings: HostDriver, golden_bundle: Path) -> InternVL:
    """The same operators, from the file as it is stored."""
    return load(golden_bundle, max_sequences=None)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each pass has."""
    return noted_sizes(monkeypatch)


def test_a_batch_is_answered_as_each_alone(
    model: InternVL, golden_model: InternVL, sizes: list[int]
) -> None:
    """More requests than a pass takes, which join and leave; each alone by the CPU."""
    wanted = [alone(golden_model, one, max_new_tokens=12) for one in ASKED]
    for _ in range(2):
        same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    assert {*sizes} == {1, 2, 3}
    model.close()


def test_beyond_the_trained_length(model: InternVL, golden_model: InternVL) -> None:
    """There each position has a base, which nobody else's rows are rotated by."""
    trained = model.spec.language.max_position_embeddings
    ids = np.random.default_rng(0).integers(5, 400, trained + 9).tolist()
    asked, options = [ids[: trained - 15], ids, ids[:20]], {"max_new_tokens": 25}
    wanted = [golden_model.generate(one, ignore_eos=True, **options) for one in asked]
    same(model.generate_batch(asked, ignore_eos=True, **options), wanted)
    model.close()


def test_a_pass_is_of_one_base(
    bindings: HostDriver, model: InternVL, one_by_one: InternVL, sizes: list[int]
) -> None:
    """The first and the last share one, with a row for the one between, or all three do; and no
    table is filled again for that."""
    lengths, theta = [9, 40, 5], model.spec.language.rope_theta
    batch, others = caches(model, lengths), caches(one_by_one, lengths)
    several = [(1, 3, 1), (1, 5, 1), (7, 7, 7), (7, 7, 7), (1, 8, 1), (8, 1, 1)]
    for factors, passes in zip(several, (2, 2, 1, 1, 2, 2), strict=True):
        runs, alone_runs = (
            [
                replace(new_run(used, cache, [9]), base=factor * theta)
                for cache, factor in zip(own, factors, strict=True)
            ]
            for used, own in ((model, batch), (one_by_one, others))
        )
        sizes.clear(), bindings.calls.clear()
        got = [found.logits for (found,) in model.engine.run(runs)]
        assert len(sizes) == passes
        sent = len(bindings.named("cuMemcpyHtoDAsync"))
        wanted = [one_by_one.engine.run([run])[0][0].logits for run in alone_runs]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert sent == 3 * passes + 2  # three inputs each, and rows of the other base's two tables


def test_logits_of_each_are_what_they_are_alone(model: InternVL, one_by_one: InternVL) -> None:
    """Of different lengths, and over many steps."""
    lengths = [40, 254, 7]  # rotary tables are filled in blocks of 256 rows
    batch = caches(model, lengths)
    others = caches(one_by_one, lengths)
    for token in range(9, 15):
        runs = [new_run(model, cache, [token + i]) for i, cache in enumerate(batch)]
        got = [found.logits for (found,) in model.engine.run(runs)]
        wanted = [one_by_one.engine.decode(other, token + i) for i, other in enumerate(others)]
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_prompt_beside_steps(model: InternVL, golden_model: InternVL) -> None:
    """In one call: the prompt by itself in its slot, the others share a pass."""
    first, new, last = caches(model, [6, 0, 9])
    runs = [
        new_run(model, last, [7]),
        new_run(model, new, [5, 6, 7]),
        new_run(model, first, [8]),
    ]
    got = [found.logits for (found,) in model.engine.run(runs)]
    for index, ids in ((0, [*range(7, 16), 7]), (1, [5, 6, 7]), (2, [*range(5, 11), 8])):
        wanted = golden_model.logits(ids)[-1]
        np.testing.assert_allclose(got[index], wanted, atol=1e-5)
    assert [cache.slot.end for cache in (first, new, last)] == [7, 3, 10]


def test_slots_between_keep_what_they_hold(model: InternVL) -> None:
    check_between(model)


def test_a_longer_slot_between_is_within_the_total(model: InternVL) -> None:
    """Its row stands behind all others'."""
    batch = caches(model, [3, 60, 4])
    row = np.zeros((1, 1), np.float32)
    parts = [Slice(cache, row, 1.0, np.array([0])) for cache in (batch[0], batch[2])]
    layout = Layout.of(parts)
    assert (layout.last.tolist(), layout.total) == ([3, 60, 4], 61)
    assert (layout.start, layout.stop, layout.places) == (3, 5, [0, 2])


def test_what_was_copied_is_held(model: InternVL) -> None:
    """Before anything is run in that slot."""
    first, new, last, source = caches(model, [3, 0, 4, 20])
    new.copy_rows(source, 0, 20)
    before = held(new)
    model.engine.run([new_run(model, cache, [9]) for cache in (first, last)])
    np.testing.assert_array_equal(held(new)[:, :, :20], before[:, :, :20])


def test_a_full_slot_between_is_left_out(model: InternVL, sizes: list[int]) -> None:
    """It has no place for a row that nobody reads."""
    first, full, last = caches(model, [5, CONTEXT, 4])
    before, following = held(full), held(last)
    assert list(together([first.slot, last.slot])) == [[0], [1]]
    sizes.clear()
    model.engine.run([new_run(model, first, [9])])
    model.engine.run([new_run(model, cache, [9]) for cache in (first, last)])
    assert sizes == [1, 1, 1]
    np.testing.assert_array_equal(held(full), before)
    changed = np.flatnonzero((held(last) != following).any(axis=(0, 1, 3)))
    assert set(changed) <= {4}
    full.state.truncate(0)
    model.engine.run([new_run(model, full, [7])])
    assert list(together([last.slot, first.slot])) == [[1, 0]]


def test_a_slot_that_was_full_is_empty_when_its_cache_is_gone(model: InternVL) -> None:
    first, full, last = caches(model, [5, CONTEXT, 4])
    del full
    assert list(together([first.slot, last.slot])) == [[0, 1]]


def test_a_slot_that_another_base_fills_is_left_out_afterwards(
    model: InternVL, sizes: list[int]
) -> None:
    """Passes of one call change what the next ones may hold a place in."""
    first, between, last = caches(model, [5, CONTEXT - 1, 4])
    theta = model.spec.language.rope_theta
    row = model.engine._embedding.rows(np.array([9]))
    wanted = np.array([0])
    following = held(last)
    sizes.clear()
    bases = ((between, 2 * theta), (first, theta), (last, theta))
    model.engine.backend.forward([Slice(cache, row, base, wanted) for cache, base in bases])
    assert sizes == [1, 1, 1]
    changed = np.flatnonzero((held(last) != following).any(axis=(0, 1, 3)))
    assert set(changed) <= {4}


def test_a_step_of_three(bindings: HostDriver, model: InternVL) -> None:
    """One wait, no memory, one pass, whose choice is of each row."""
    three = caches(model, [3, 4, 5])
    language = model.spec.language

    def step(token: int, count: int) -> None:
        model.engine.run([new_run(model, cache, [token], count) for cache in three])

    for token in (6, 7):
        step(token, 1)
    bindings.calls.clear()
    for token in (8, 9):
        step(token, 1)
    assert bindings.named("cuMemAlloc", "cuMemHostAlloc") == []
    assert bindings.named(*WAITS) == [(21,)] * 2
    assert len(bindings.named("run")) == 2
    assert [call[2] for call in bindings.named("cuMemcpyDtoHAsync")] == [8] * 6
    sent = sum(call[2] for call in bindings.named("cuMemcpyHtoDAsync"))
    assert sent == 2 * 3 * (language.hidden_size * 4 + 4 + 8)


def test_candidates_of_each_are_its_largest_logits(model: InternVL) -> None:
    check_candidates(model)


def test_a_slot_serves_the_next_cache_and_more_than_slots_have_memory_of_their_own(
    bindings: HostDriver, model: InternVL
) -> None:
    memory = len(bindings.memory)
    check_slots(bindings, model)
    assert len(bindings.memory) == memory  # taken when the model was loaded


def test_a_prompt_begun_beside_is_copied_on_the_device(
    bindings: HostDriver, golden_bundle: Path, golden_model: InternVL
) -> None:
    """From slot to slot, and to a storage of one."""
    model = load(golden_bundle, reuse_bytes=1 << 30)
    asked = ["word " * 60] * 5
    got = model.generate_batch(asked, max_new_tokens=4)
    tokens = got[0].timings.prompt_tokens
    assert [one.timings.cached_tokens for one in got] == [0, *[tokens - 1] * 4]
    same(got, [alone(golden_model, asked[0], max_new_tokens=4)] * 5)
    model.close()


@pytest.mark.parametrize("at", range(0, 40, 5))
def test_interrupted_anywhere_the_next_step_is_right(
    model: InternVL, one_by_one: InternVL, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """What a pass had begun to change is changed again, or is not looked at."""
    batch, others = (caches(used, [6, 30, 9]) for used in (model, one_by_one))
    calls = iter(range(at))
    call = Driver.__call__

    def interrupted(self: Driver, name: str, *arguments: Any) -> Any:
        # Not those that give memory back, which nothing can interrupt.
        if name.startswith(("cuMemcpy", "cuStream", "cuLaunch")) and next(calls, None) is None:
            monkeypatch.setattr(Driver, "__call__", call)
            raise KeyboardInterrupt
        return call(self, name, *arguments)

    monkeypatch.setattr(Driver, "__call__", interrupted)
    with suppress(KeyboardInterrupt):
        for token in (7, 8, 9):
            model.engine.run([new_run(model, cache, [token], 1) for cache in batch])
        monkeypatch.setattr(Driver, "__call__", call)
    for other, cache in zip(others, batch, strict=True):
        for token in (7, 8, 9)[: cache.state.length - other.state.length]:
            one_by_one.engine.decode(other, token)
    got = [found.logits for (found,) in model.engine.run([new_run(model, c, [5]) for c in batch])]
    wanted = [one_by_one.engine.decode(other, 5) for other in others]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
