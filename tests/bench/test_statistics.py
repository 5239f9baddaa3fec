"""Percentiles against NumPy, warm-up and outliers, by a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bench.common.summaries import percentile, repeat, summarise, timed
from internvl_edge.bench.latency.measure import Point, Run, collect

SAMPLES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)


class Clock:
    """Time that passes only while a task runs, as long as each run is told to take."""

    def __init__(self, seconds: list[float]) -> None:
        self.now = 0.0
        self.ahead = iter(seconds)

    def __call__(self) -> float:
        return self.now

    def task(self) -> None:
        self.now += next(self.ahead)


@given(SAMPLES, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    # Rounding only: NumPy interpolates from the nearer end.
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9)


@given(SAMPLES)
def test_summary_is_numpys(values: list[float]) -> None:
    found = summarise(values)
    p25, p50, p75, p90, p99 = np.percentile(values, [25, 50, 75, 90, 99])
    assert (found.p25, found.median, found.p75) == pytest.approx((p25, p50, p75), rel=1e-9)
    assert (found.p90, found.p99) == pytest.approx((p90, p99), rel=1e-9)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert (found.minimum, found.maximum) == (min(values), max(values))
    assert found.spread == pytest.approx(p75 - p25, rel=1e-6, abs=1e-9)
    assert found.samples == tuple(values)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_of_nothing(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_clock_and_warm_up(warmup: int) -> None:
    seconds = [0.5, 0.25, 1.0, 0.125, 2.0, 0.75, 0.5, 4.0]
    clock = Clock([100.0] * warmup + seconds)
    found = timed(clock.task, runs=len(seconds), warmup=warmup, clock=clock)
    assert found == seconds  # powers of two and their sums: exact
    assert summarise(found).maximum == 4.0
    assert next(clock.ahead, None) is None  # no run more than asked


def test_repeat_keeps_results_in_order() -> None:
    numbers = iter(range(10))
    assert repeat(lambda: next(numbers), runs=3, warmup=2) == [2, 3, 4]


def test_outliers_are_counted_and_kept() -> None:
    values = [1.0, 1.1, 0.9, 1.0, 1.05, 9.0, 0.01]
    found = summarise(values)
    assert found.outliers == 2
    assert found.samples == tuple(values)
    assert summarise([1.0] * 5).outliers == 0


def test_gaps_of_all_runs_are_pooled() -> None:
    runs = [Run({"prefill": 0.5}, [0.1, 0.3], 8, None), Run({"prefill": 1.5}, [0.2, 0.2], 8, None)]
    found = collect(Point(0, 4, 3), runs)
    assert found.phases["itl"].samples == (0.1, 0.3, 0.2, 0.2)
    assert found.phases["prefill"].median == 1.0
    assert found.prefill_tokens_per_s == 8.0
    assert found.decode_tokens_per_s == pytest.approx(4 / 0.8)
    assert found.energy is None


def test_no_gap_no_rate() -> None:
    found = collect(Point(0, 4, 1), [Run({"prefill": 0.5}, [], 8, None)])
    assert "itl" not in found.phases
    assert found.decode_tokens_per_s == 0.0
