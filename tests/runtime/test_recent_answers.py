"""What earlier answers say of the next token, beside a search through them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime.decoding import recent_answers
from internvl_edge.runtime.decoding.ngrams import LONGEST, Drafter
from internvl_edge.runtime.decoding.recent_answers import Recalled, RecentAnswers

SLOT, VOCAB = 4, 6
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=20)
GIVEN = st.lists(st.tuples(IDS, IDS), max_size=5)


def searched(texts: Sequence[Sequence[int]], tail: Sequence[int]) -> list[int]:
    """What followed `tail` in the latest text that holds it, there the last time."""
    if len(tail) < LONGEST or SLOT in tail:
        return []
    for text in reversed(texts):
        for end in range(len(text), LONGEST - 1, -1):
            if list(text[end - LONGEST : end]) == list(tail):
                return list(text[end:])
    return []


def said(found: Recalled) -> list[int]:
    """What a drafter would guess, as far as it knows."""
    return Drafter(found).draft(100) if found.matched else []


@given(answers=GIVEN, ids=IDS, more=IDS)
def test_they_are_found_as_a_search_finds_them(
    answers: list[tuple[list[int], list[int]]], ids: list[int], more: list[int]
) -> None:
    recent, texts = RecentAnswers(VOCAB), []
    for prompt, answer in answers:
        recent.add(prompt, answer, SLOT)
        texts.append([*prompt[-LONGEST:], *answer])
    found = recent.before(ids)
    for end in range(len(more) + 1):
        expected = searched(texts, [*ids, *more[:end]][-LONGEST:])
        cut = expected.index(SLOT) if SLOT in expected else len(expected)
        assert said(found) == expected[:cut]
        if end < len(more):
            found.append(more[end])


def test_no_guess_leads_from_one_answer_into_another() -> None:
    recent = RecentAnswers(VOCAB)
    recent.add([], [0, 1, 2], SLOT)
    recent.add([], [3, 3, 3], SLOT)
    assert recent.before([0, 1, 2]).matched == 0
    assert recent.before([1, 2, 3]).matched == 0


def test_the_later_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_answers, "KEPT", 100)
    draw, vocab = random.Random(0), 1000
    recent, texts = RecentAnswers(vocab), []
    for _ in range(60):
        texts.append([draw.randrange(vocab - 1) for _ in range(9)])
        recent.add([], texts[-1], vocab - 1)
        assert len(recent.ids) == 100
    known = [recent.before(text[:3]).matched for text in texts]
    assert known == sorted(known)
    assert sum(known) == 10


@given(answers=GIVEN, ids=IDS, most=st.integers(1, 9), kept=st.integers(LONGEST + 2, 30))
def test_what_is_followed_may_be_written_over(
    answers: list[tuple[list[int], list[int]]], ids: list[int], most: int, kept: int
) -> None:
    """Guesses are then what stands there now: tokens, and no more than were asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent_answers, "KEPT", kept)
        recent = RecentAnswers(VOCAB)
        drafter = Drafter(recent.before([]))
        for (prompt, answer), token in zip(answers, ids, strict=False):
            recent.add(prompt, answer, SLOT)
            drafter.append(token)
            guesses = drafter.draft(most)
            assert len(guesses) <= most
            assert all(0 <= guess < VOCAB and guess != SLOT for guess in guesses)
            assert len(recent.ids) == kept


def test_keys_of_the_largest_vocabulary_are_told_apart() -> None:
    vocab = 200_000
    recent = RecentAnswers(vocab)
    recent.add([vocab - 3], [vocab - 2, vocab - 1, 7], vocab)
    recent.add([vocab - 3], [vocab - 1, vocab - 2, 8], vocab)
    assert said(recent.before([vocab - 3, vocab - 2, vocab - 1])) == [7]
