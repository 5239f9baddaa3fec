"""The shelf: bounded, in order, found by beginnings, and whole after an interrupt anywhere."""

from __future__ import annotations

import random
from typing import Any

import pytest
from campaign.interrupts import Moments
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime.decoding.shelf import ITEM_BYTES, Shelf, common_bytes


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40)), max_size=60),
    st.integers(0, 5 * ITEM_BYTES),
)
def test_a_shelf_is_bounded_and_forgets_the_oldest(puts: list[tuple[int, int]], limit: int) -> None:
    shelf, expected = Shelf(limit), dict[str, int]()
    for number, size in puts:
        key = str(number)
        shelf.put(key, number, size)
        expected.pop(key, None)
        if size + ITEM_BYTES <= limit:
            expected[key] = size + ITEM_BYTES  # dictionaries keep the order of insertion
            while sum(expected.values()) > limit:
                del expected[next(iter(expected))]
        assert [name for name, _ in shelf.values()] == list(reversed(expected))
        assert shelf.nbytes == sum(expected.values()) <= limit


def test_what_was_looked_at_last_stays() -> None:
    shelf = Shelf(2 * ITEM_BYTES)
    shelf.put("a", 1, 0)
    shelf.put("b", 2, 0)
    assert shelf.get("a") == 1
    shelf.put("c", 3, 0)
    assert (shelf.get("a"), shelf.get("b"), shelf.get("c")) == (1, None, 3)


def test_a_prompt_counts() -> None:
    shelf = Shelf(1 << 20)
    shelf.put("a", 1, 5, b"prompt")
    assert shelf.nbytes == 5 + ITEM_BYTES + len(b"prompt")


PROMPTS = st.lists(st.text("ab", max_size=8).map(str.encode), max_size=30)


@given(PROMPTS, st.text("ab", max_size=8).map(str.encode))
def test_the_longest_common_beginning_is_near(prompts: list[bytes], sought: bytes) -> None:
    shelf = Shelf(1 << 20)
    for number, prompt in enumerate(prompts):
        shelf.put(str(number), prompt, 0, prompt)
    near = [common_bytes(prompt, sought) for _, prompt in shelf.nearest(sought)]
    every = sorted((common_bytes(prompt, sought) for prompt in prompts), reverse=True)
    assert max(near, default=0) == max(every, default=0)
    # Of the two nearest one may be the asker's own.
    assert sorted(near, reverse=True)[1:2] == every[1:2] or len(prompts) < 2


@given(PROMPTS, st.text("ab", max_size=8).map(str.encode))
def test_beginnings_are_beginnings(prompts: list[bytes], whole: bytes) -> None:
    """All of them where they are few."""
    shelf = Shelf(1 << 20)
    for prompt in prompts:
        shelf.put(prompt.decode() or "none", prompt, 0, prompt)
    found = shelf.beginnings(whole)
    wanted = {prompt.decode() or "none" for prompt in prompts if whole.startswith(prompt)}
    assert len(found) == len(set(found))
    assert set(found) <= wanted
    assert len(found) >= min(len(wanted), 2)


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_common_bytes(a: bytes, b: bytes) -> None:
    length = common_bytes(a, b)
    assert a[:length] == b[:length]
    assert a[length : length + 1] != b[length : length + 1] or length == min(len(a), len(b))


class Compared(bytes):
    """Counts its comparisons."""

    count = 0

    def __lt__(self, other: Any) -> bool:
        Compared.count += 1
        return bytes.__lt__(self, other)

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


@pytest.mark.parametrize("kept", [100, 10_000, 100_000])
def test_finding_keeping_and_forgetting_stay_cheap(kept: int) -> None:
    """In comparisons of prompts: each halves those that are left."""
    shelf = Shelf(1 << 40)
    for number in range(kept):
        shelf.put(str(number), number, 0, Compared(number.to_bytes(4, "big")))
    limit = 3 * kept.bit_length()
    sought = Compared((kept // 3).to_bytes(4, "big"))
    for ask in (
        lambda: shelf.nearest(sought),
        lambda: shelf.put("new", 0, 0, sought),
        lambda: shelf.drop("new"),
    ):
        Compared.count = 0
        ask()
        assert Compared.count <= limit
    assert (str(kept // 3), kept // 3) in shelf.nearest(sought)


def test_an_interrupt_anywhere_leaves_it_whole() -> None:
    """What it holds is what it says; order, sum and items agree from the next call on."""
    for at in range(1, 400):
        draw = random.Random(at)
        shelf = Shelf(6 * ITEM_BYTES)
        try:
            with Moments(at, interrupt) as counted:
                for _ in range(8):
                    change(shelf, draw)
        except KeyboardInterrupt:
            pass
        else:
            break
        shelf.put("last", "last", 0, b"last")
        held = dict(shelf.values())
        assert held["last"] == "last"
        assert shelf.nbytes <= shelf.limit
        for key, value in held.items():
            assert value == "last" or (key, value) in shelf.nearest(value)
        prompts = [prompt for prompt, _ in shelf._order]
        assert prompts == sorted(prompts)
        assert {key for _, key in shelf._order} == held.keys()
        assert shelf._held == shelf.nbytes
    assert at > 50
    assert counted.seen < at


def interrupt() -> None:
    raise KeyboardInterrupt


def change(shelf: Shelf, draw: random.Random) -> None:
    key = draw.choice("abcdefgh")
    if draw.random() < 0.3:
        shelf.drop(key)
    else:
        shelf.put(key, key.encode(), draw.randrange(ITEM_BYTES), key.encode())
    shelf.beginnings(key.encode())
