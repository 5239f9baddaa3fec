"""Intervals and tests against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from internvl_edge.bench.common.intervals import Comparison, Estimate, bootstrap, mcnemar, wilson

SCORES = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=30)


@given(st.integers(1, 3000), st.data())
def test_wilson_is_scipy_s(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    expected = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert wilson(right, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_mcnemar_of_many_pairs() -> None:
    assert mcnemar(2400, 2600) == pytest.approx(stats.binomtest(2400, 5000).pvalue, rel=1e-9)


def test_bootstrap_is_scipy_s() -> None:
    """Two bootstraps of 10,000 agree to a few percent of the interval's width."""
    values = np.random.default_rng(1).beta(5, 1, 300)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2)
    low, high = bootstrap(values)
    width = high - low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)
    assert bootstrap(values) == (low, high)


def test_bootstrap_in_pieces_is_whole() -> None:
    """More values than are drawn at once for all resamples: every resample is filled."""
    low, high = bootstrap(np.linspace(0, 1, 2000), resamples=1200)
    assert 0.45 < low < 0.5 < high < 0.55


@given(SCORES)
def test_estimate_holds_its_mean(scores: list[float]) -> None:
    estimate = Estimate.of(scores)
    assert estimate.mean == pytest.approx(np.mean(scores))
    assert 0 <= estimate.low <= estimate.mean + 1e-12
    assert estimate.mean - 1e-12 <= estimate.high <= 1
    assert estimate.count == len(scores)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_comparison_is_antisymmetric(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [[float(pair[side]) for pair in pairs] for side in (0, 1)]
    there, back = Comparison.of(first, second), Comparison.of(second, first)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.lost, there.gained) == (back.gained, back.lost)
    assert there.p_value == back.p_value
    assert there.low <= there.difference + 1e-12
    assert there.difference <= there.high + 1e-12


def test_comparison_of_graded_scores_has_no_mcnemar() -> None:
    graded = Comparison.of([0.5, 1, 0], [0.75, 1, 0])
    assert (graded.lost, graded.gained, graded.p_value) == (0, 1, None)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Estimate.of([])
    with pytest.raises(ValueError, match="pair"):
        Comparison.of([1.0], [1.0, 0.0])
