"""Drafts from repeated n-grams and broken copies, beside a search through the whole sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime.decoding.ngrams import LONGEST, Drafter, NgramIndex

SLOT, VOCAB = 4, 6
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def searched(ids: Sequence[int]) -> tuple[int, int]:
    """The length of the n-gram at the end that occurred before, and the place behind it."""
    for length in range(LONGEST, 0, -1):
        tail = ids[len(ids) - length :]
        ends = [
            end
            for end in range(length, len(ids))
            if ids[end - length : end] == tail and SLOT not in tail
        ]
        if ends and len(tail) == length:
            return length, ends[0] if length == 1 else ends[-1]
    return 0, 0


def found(index: NgramIndex) -> tuple[int, int]:
    return index.matched, index.place if index.matched else 0


def followed(ids: Sequence[int], place: int, most: int) -> list[int]:
    """What followed, over and over, up to an image."""
    guesses = list(ids[place:])
    while len(guesses) < most:
        guesses += ids[place:]
    guesses = guesses[:most]
    return guesses[: guesses.index(SLOT)] if SLOT in guesses else guesses


def guessed(prompt: Sequence[int], answer: Sequence[int], most: int) -> tuple[int, list[int]]:
    """What speaks for the next tokens of an answer, and these."""
    ids = list(prompt)
    matched, place = searched(ids)
    copied, broken = 0, None
    for token in answer:
        if matched and ids[place] == token != SLOT:
            source: int | None = place + 1
        else:
            broken = place if matched and copied >= 2 else broken
            copied = 0
            goes_on = broken is not None and ids[broken] == token != SLOT
            source = broken + 1 if broken is not None and goes_on else None
        copied = 0 if source is None else copied + 1
        ids.append(token)
        matched, place = searched(ids)
        if source is not None and min(copied, LONGEST) >= matched and ids[source] != SLOT:
            matched, place = min(copied, LONGEST), source
    return matched, followed(ids, place, most) if matched else []


@given(prompt=IDS, answer=IDS)
def test_an_index_finds_what_a_search_finds(prompt: list[int], answer: list[int]) -> None:
    index = NgramIndex(prompt, SLOT, VOCAB)
    for end in range(len(answer) + 1):
        assert found(index) == searched(prompt + answer[:end])
        if end < len(answer):
            index.append(answer[end])


@given(ids=IDS, cut=st.integers(0, 40))
def test_it_matters_not_what_was_the_prompt(ids: list[int], cut: int) -> None:
    whole, grown = NgramIndex(ids, SLOT, VOCAB), NgramIndex(ids[:cut], SLOT, VOCAB)
    for token in ids[cut:]:
        grown.append(token)
    assert found(whole) == found(grown)


@given(prompt=IDS, answer=IDS, most=st.integers(0, 12))
def test_drafts_are_what_was_copied_or_found(
    prompt: list[int], answer: list[int], most: int
) -> None:
    drafter = Drafter(NgramIndex(prompt, SLOT, VOCAB))
    for end in range(len(answer) + 1):
        expected = guessed(prompt, answer[:end], most)
        assert (drafter.matched, drafter.draft(most)) == expected
        if expected[1]:
            assert drafter.next == expected[1][0]
        if end < len(answer):
            drafter.append(answer[end])


def test_a_form_goes_on_behind_what_was_filled_in() -> None:
    """By n-grams alone the field before would follow a value, as it did the last time."""
    form = list(json.dumps(dict.fromkeys(("shop", "date", "total"), ""), indent=2).encode())
    filled = json.dumps({"shop": "ABC", "date": "7 May", "total": "3.20"}, indent=2).encode()
    drafter = Drafter(NgramIndex(form, 256, 257))
    right = {}
    for end, byte in enumerate(filled):
        right[end] = drafter.draft(7) == list(filled[end : end + 7])
        drafter.append(byte)
    for key in (b"date", b"total"):
        assert right[filled.index(key)]
        assert right[filled.index(b",", filled.index(key) - 6)]


def test_keys_of_the_largest_vocabulary_are_told_apart() -> None:
    vocab = 200_000
    ids = [vocab - 1, vocab - 2, vocab - 3, 7, vocab - 1, vocab - 2, vocab - 3]
    index = NgramIndex(ids, vocab, vocab)
    assert (index.matched, ids[index.place]) == (3, 7)


def test_an_image_is_never_proposed() -> None:
    drafter = Drafter(NgramIndex([1, 2, SLOT, SLOT, 3, 1], SLOT, VOCAB))
    assert drafter.draft(5) == [2]
    drafter.append(2)
    assert drafter.draft(5) == []
    drafter.append(SLOT)
    assert drafter.matched == 0
