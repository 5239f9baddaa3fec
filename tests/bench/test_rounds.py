"""Rounds count where the machine was in one state; the choice sees bandwidths, never figures."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bench.common.machine import MOST_DRIFT
from internvl_edge.bench.common.rounds import MOST_ROUNDS, Rounds, measure_rounds, steady_rounds

bandwidths = st.lists(st.integers(30, 80).map(float), min_size=2, max_size=7)


def agree(readings: list[float]) -> bool:
    return not readings or max(readings) <= MOST_DRIFT * min(readings)


@given(bandwidths)
def test_no_other_set_is_larger(bandwidth: list[float]) -> None:
    def around(rounds: tuple[int, ...]) -> list[float]:
        return [bandwidth[i + after] for i in rounds for after in (0, 1)]

    kept = tuple(steady_rounds(bandwidth))
    assert agree(around(kept))
    numbers = range(len(bandwidth) - 1)
    for size in range(len(kept) + 1, len(bandwidth)):
        assert not any(agree(around(other)) for other in combinations(numbers, size))
    equal = [c for c in combinations(numbers, len(kept)) if agree(around(c))]
    assert min(around(kept), default=0) == max(min(around(c), default=0) for c in equal)


def measured(wanted: int, bandwidth: list[float]) -> Rounds[int]:
    """Rounds on a machine with these bandwidths one after the other, and then the last."""
    left = [gb * 1e9 for gb in bandwidth]
    return measure_rounds(
        wanted, lambda number: number, lambda: left.pop(0) if len(left) > 1 else left[0]
    )


def test_a_quiet_machine_measures_no_more_than_asked() -> None:
    rounds = measured(3, [50, 49, 51, 50])
    assert rounds.counted == rounds.found == [0, 1, 2]
    assert rounds.ceiling == 51e9
    assert rounds.steady
    assert rounds.note is None


def test_disturbed_rounds_are_measured_again() -> None:
    rounds = measured(3, [50, 49, 30, 51, 50, 70, 49, 50])
    # Around round 1, 2, 4 and 5 there is a reading of another machine, as it were.
    assert rounds.kept == rounds.counted == [0, 3, 6]
    assert rounds.steady
    assert rounds.ceiling == 51e9
    assert rounds.note == (
        "4 of 7 rounds do not count: memory was read at 49.0 to 51.0 GB/s around the others, at"
        " 30.0 to 70.0 GB/s in all"
    )


def test_a_machine_that_does_not_settle_is_told() -> None:
    rounds = measured(2, [30, 60, 30, 60, 30, 60, 30, 60])
    assert len(rounds.found) == 2 * MOST_ROUNDS
    assert rounds.counted == rounds.found
    assert not rounds.steady
    assert "read at 30.0 to 60.0 GB/s between rounds" in (rounds.note or "")


@pytest.mark.parametrize("readings", [[40.0, 40.0], [40.0, 46.0]])
def test_one_round(readings: list[float]) -> None:
    assert measured(1, readings).kept == [0]
