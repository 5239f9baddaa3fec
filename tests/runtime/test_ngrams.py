"""Drafts from repeated n-grams, beside a search through the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime.decoding.ngrams import LONGEST, NgramIndex

SLOT, VOCAB = 4, 6
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def searched(ids: Sequence[int], most: int) -> tuple[int, list[int]]:
    """The length of the n-gram at the end that occurred before, and what followed it."""
    for length in range(LONGEST, 0, -1):
        tail = ids[len(ids) - length :]
        ends = [
            end
            for end in range(length, len(ids))
            if ids[end - length : end] == tail and SLOT not in tail
        ]
        if ends and len(tail) == length:
            place = ends[0] if length == 1 else ends[-1]
            followed = list(ids[place:])
            while len(followed) < most:
                followed += ids[place:]
            found = followed[:most]
            return length, found[: found.index(SLOT)] if SLOT in found else found
    return 0, []


@given(prompt=IDS, answer=IDS, most=st.integers(0, 12))
def test_drafts_are_what_a_search_finds(prompt: list[int], answer: list[int], most: int) -> None:
    index = NgramIndex(prompt, SLOT, VOCAB)
    for end in range(len(answer) + 1):
        assert (index.matched, index.draft(most)) == searched(prompt + answer[:end], most)
        if end < len(answer):
            index.append(answer[end])


@given(ids=IDS, cut=st.integers(0, 40))
def test_it_matters_not_what_was_the_prompt(ids: list[int], cut: int) -> None:
    whole, grown = NgramIndex(ids, SLOT, VOCAB), NgramIndex(ids[:cut], SLOT, VOCAB)
    for token in ids[cut:]:
        grown.append(token)
    assert (whole.matched, whole.draft(9)) == (grown.matched, grown.draft(9))


def test_keys_of_the_largest_vocabulary_are_told_apart() -> None:
    vocab = 200_000
    ids = [vocab - 1, vocab - 2, vocab - 3, 7, vocab - 1, vocab - 2, vocab - 3]
    index = NgramIndex(ids, vocab, vocab)
    assert (index.matched, index.draft(1)) == (3, [7])


def test_an_image_is_never_proposed() -> None:
    index = NgramIndex([1, 2, SLOT, SLOT, 3, 1], SLOT, VOCAB)
    assert index.draft(5) == [2]
    index.append(2)
    assert index.draft(5) == []
    index.append(SLOT)
    assert index.matched == 0
