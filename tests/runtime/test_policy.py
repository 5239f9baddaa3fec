"""How requests share a model: what may be told, and how a chunk finds its length."""

from __future__ import annotations

import math
from typing import Any

import pytest

from internvl_edge.runtime import Policy, UsageError
from internvl_edge.runtime.decoding.policy import FIRST_CHUNK, Pace


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"most_running": 0}, "most_running is 0, it must be at least 1"),
        ({"most_running": 1.5}, "most_running is 1.5, it must be a whole number"),
        ({"growth": -0.1}, "growth is -0.1, it must be at least 0"),
        ({"growth": math.nan}, "growth is nan, it must be at least 0"),
        ({"aging_s": "old"}, "aging_s is 'old', it must be a number"),
        ({"ahead": 0}, "ahead is 0, it must be at least 1"),
        ({"memory_bytes": -1}, "memory_bytes is -1, it must be at least 0"),
    ],
)
def test_what_no_policy_can_be_is_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Policy(**told)


def test_numbers_are_taken_as_they_are_meant() -> None:
    assert Policy(most_running=4.0, memory_bytes=1e6) == Policy(4, memory_bytes=1_000_000)  # type: ignore[arg-type]
    assert Policy.of(None) == Policy()
    with pytest.raises(UsageError, match="policy is 'fair', it must be a Policy"):
        Policy.of("fair")  # type: ignore[arg-type]


def settled(growth: float, alone: float, each: float) -> int:
    """The chunk after many steps in which a token of a prompt takes so long."""
    pace = Pace(growth)
    for _ in range(20):
        pace.decoded(4, alone)
        pace.prefilled(4, pace.chunk, alone + each * pace.chunk)
    return pace.chunk


@pytest.mark.parametrize(("growth", "each"), [(1.0, 0.01), (0.5, 0.01), (1.0, 0.001), (2.0, 0.02)])
def test_a_chunk_takes_the_share_that_it_may(growth: float, each: float) -> None:
    wanted = growth * 0.1 / each
    assert wanted - 1 <= settled(growth, 0.1, each) <= wanted + 1


def test_a_chunk_is_never_nothing() -> None:
    assert settled(0.0, 0.1, 0.01) == 1
    assert settled(1.0, 0.001, 5.0) == 1


def test_a_chunk_changes_by_steps_and_by_whole_chunks_only() -> None:
    pace = Pace(1.0)
    assert pace.chunk == FIRST_CHUNK
    pace.prefilled(4, FIRST_CHUNK, 9.0)  # beside what, is not known yet
    assert pace.chunk == FIRST_CHUNK
    pace.decoded(4, 0.1)
    pace.prefilled(4, FIRST_CHUNK - 1, 9.0)  # the end of a prompt
    assert pace.chunk == FIRST_CHUNK
    pace.prefilled(4, FIRST_CHUNK, 0.1)
    assert pace.chunk == 2 * FIRST_CHUNK
    pace.prefilled(4, 2 * FIRST_CHUNK, 9.0)
    assert pace.chunk == FIRST_CHUNK


def test_a_delayed_step_changes_little() -> None:
    """Of what decoding takes alone it changes nothing; of what a prompt adds, a quarter."""
    pace = Pace(1.0)
    for _ in range(20):
        pace.decoded(4, 0.1)
        pace.prefilled(4, pace.chunk, 0.1 + 0.002 * pace.chunk)
    assert pace.chunk == 50
    pace.decoded(4, 0.9)
    pace.prefilled(4, 50, 0.2)
    assert pace.chunk == 50
    pace.prefilled(4, 50, 0.3)  # a token took twice as long
    assert pace.chunk == 40


@pytest.mark.parametrize(
    ("growth", "last", "rested", "share"),
    [
        (1.0, 0.1, 0.0, 0.1),  # as long as a step
        (1.0, 0.1, 0.03, 0.07),  # but for what operators take to rest
        (1.0, 0.1, 0.3, 0.0),
        (0.5, 0.1, 0.0, 0.05),
        (1.0, 0.08, 0.0, 0.08),  # a step takes less by now
        (1.0, 0.15, 0.0, 0.05),  # a prompt took its part
        (1.0, 0.25, 0.0, 0.0),
    ],
)
def test_pictures_share_what_the_time_between_tokens_may_grow_by(
    growth: float, last: float, rested: float, share: float
) -> None:
    pace = Pace(growth)
    assert pace.share == 0.0
    pace.decoded(4, 0.1)
    pace.rested(rested)
    if last != 0.1:
        pace.prefilled(4, 1, last)
    assert pace.share == pytest.approx(share)


def test_a_step_beside_pictures_is_no_measure_of_one_alone() -> None:
    pace = Pace(1.0)
    pace.decoded(4, 0.1)
    for _ in range(20):
        pace.rested(0.0)
        pace.decoded(4, 0.13)
    assert pace.share == pytest.approx(0.07)
    for _ in range(40):
        pace.rested(None)
        pace.decoded(4, 0.13)
    assert pace.share == pytest.approx(0.13, rel=1e-3)


def test_what_operators_took_to_rest_is_forgotten_slowly() -> None:
    pace = Pace(1.0)
    pace.decoded(4, 0.1)
    pace.rested(0.08)
    pace.rested(0.01)
    assert 0.02 < pace.share < 0.06
    for _ in range(20):
        pace.rested(0.01)
    assert pace.share == pytest.approx(0.09)
