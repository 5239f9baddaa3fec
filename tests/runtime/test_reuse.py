"""What outlives an answer: bounded, right, and shared by threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.decoding.reuse import PrefixStore
from internvl_edge.runtime.decoding.shelf import Shelf

QUESTION = "<image>\nWhat is written here, line by line?"


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def model(golden_bundle: Path) -> InternVL:
    return InternVL.load(golden_bundle, device="cpu", threads=1)


class StandInCache:
    """Positions that hold their own signature."""

    def __init__(self, capacity: int = 4096) -> None:
        self.state = CacheState(capacity)
        self.rows = np.zeros(capacity, np.int64)

    @property
    def nbytes(self) -> int:
        return 8 * self.state.length

    @property
    def held_bytes(self) -> int:
        return self.nbytes

    def trim(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def copy_rows(self, source: Any, start: int, stop: int) -> None:
        self.rows[start:stop] = source.rows[start:stop]

    def extended(self, signatures: NDArray[np.int64], base: float = 1.0) -> StandInCache:
        start = self.state.length
        self.rows[start : start + len(signatures)] = signatures
        self.state.extend(signatures, base)
        return self


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=120), max_size=5),
    st.lists(st.integers(0, 1), min_size=1, max_size=120),
    st.integers(0, 60),
)
def test_the_longest_prefix_is_copied(kept: list[list[int]], wanted: list[int], own: int) -> None:
    store = PrefixStore(Shelf(1 << 20))
    for other in kept:
        store.keep(StandInCache().extended(np.array(other)))
    signatures = np.array(wanted)
    cache = StandInCache().extended(signatures[:own])
    held = cache.state.length
    shared = store.fill(cache, signatures, 1.0)
    best = max((_common(other, wanted) for other in kept), default=0)
    assert shared == (best if best > held + 16 else held)
    assert cache.state.length == shared
    np.testing.assert_array_equal(cache.rows[:shared], signatures[:shared])


def test_another_rotary_base_shares_nothing() -> None:
    store, signatures = PrefixStore(Shelf(1 << 20)), np.arange(100)
    store.keep(StandInCache().extended(signatures, base=2.0))
    assert store.fill(StandInCache(), signatures, 1.0) == 0


def test_a_cache_that_holds_more_replaces_those_that_hold_less() -> None:
    shelf = Shelf(1 << 20)
    store = PrefixStore(shelf)
    for length in (20, 50, 40):
        store.keep(StandInCache().extended(np.arange(length)))
    assert [value.state.length for _, value in shelf.values()] == [40, 50]


def test_a_second_chat_begins_where_the_first_did(model: InternVL, golden_model: InternVL) -> None:
    first = model.chat().send(QUESTION, [picture(0)], max_new_tokens=6)
    assert first.timings.tiles > 0
    second = model.chat().send(QUESTION, [picture(0)], max_new_tokens=6)
    assert second.token_ids == first.token_ids
    assert second.timings.tiles == 0
    assert second.timings.cached_tokens == second.timings.prompt_tokens - 1
    other = model.generate("<image>\nAnd who wrote it?", [picture(0)], max_new_tokens=6)
    alone = golden_model.generate("<image>\nAnd who wrote it?", [picture(0)], max_new_tokens=6)
    assert other.token_ids == alone.token_ids
    assert other.timings.tiles == 0
    assert 16 < other.timings.cached_tokens < other.timings.prompt_tokens - 1


def test_another_picture_is_not_taken_for_the_first(
    model: InternVL, golden_model: InternVL
) -> None:
    model.generate(QUESTION, [picture(0)], max_new_tokens=6)
    second = model.generate(QUESTION, [picture(1)], max_new_tokens=6)
    assert second.timings.tiles > 0
    alone = golden_model.generate(QUESTION, [picture(1)], max_new_tokens=6)
    assert second.token_ids == alone.token_ids


def test_chats_in_eight_threads_answer_as_alone(model: InternVL, golden_model: InternVL) -> None:
    """All begin alike, so that they copy from one another while they run."""
    questions = [f"<image>\nWhat is in line {n % 3}?" for n in range(8)]
    alone = [
        golden_model.generate(question, [picture(n % 2)], max_new_tokens=6).token_ids
        for n, question in enumerate(questions)
    ]
    start = threading.Barrier(8)

    def ask(n: int) -> list[list[int]]:
        chat = model.chat()
        start.wait()
        answers = []
        for _ in range(3):
            answers.append(chat.send(questions[n], [picture(n % 2)], max_new_tokens=6).token_ids)
            chat = model.chat()
        return answers

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(8)))
    assert results == [[answer] * 3 for answer in alone]


def _common(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def test_caches_under_several_rotary_bases_are_not_kept() -> None:
    """Nothing could begin as they do, whatever it is under."""
    shelf = Shelf(1 << 20)
    store, cache = PrefixStore(shelf), StandInCache().extended(np.arange(30))
    store.keep(cache)
    store.keep(cache.extended(np.arange(3), base=2.0))
    assert shelf.values() == []


def test_finding_a_prompt_compares_few_of_those_kept() -> None:
    """However many there are; each differs from the others somewhere."""
    counts = []
    for kept in (10, 1000, 20_000):
        shelf = Shelf(1 << 40)
        store = PrefixStore(shelf)
        for number in range(kept):
            prompt = np.arange(40)
            prompt[20:23] = 1000 + np.array([number // 400, number // 20 % 20, number % 20])
            store.keep(CountedCache(64).extended(prompt))
        CountedCache.asked = 0
        assert store.fill(CountedCache(64), prompt, 1.0) == 40
        counts.append(CountedCache.asked)
    assert max(counts) <= 8


class CountedState(CacheState):
    """Counts the comparisons with a prompt."""

    def common_prefix(self, signatures: NDArray[np.int64], base: float) -> int:
        CountedCache.asked += 1
        return super().common_prefix(signatures, base)


class CountedCache(StandInCache):
    """A cache that counts how often any of its kind is compared."""

    asked = 0

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.state = CountedState(capacity)
