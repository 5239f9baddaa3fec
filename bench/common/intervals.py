"""How far a mean score may be off, and whether two sets of scores differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
#: Standard normal quantile of the level, two-sided.
QUANTILE = 1.959963984540054
RESAMPLES = 10_000
SEED = 0
#: Values drawn at once: bounds the memory of a bootstrap to about 16 MB.
DRAWN = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """A mean of scores in 0..1 with its 95% confidence interval."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Estimate:
        """Wilson's interval where every score is 0 or 1, else a bootstrap's.

        Raises:
            ValueError: no scores.
        """
        values = np.asarray(scores, float)
        if not len(values):
            raise ValueError("an estimate needs at least one score")
        low, high = wilson(int(values.sum()), len(values)) if _binary(values) else bootstrap(values)
        return cls(float(values.mean()), low, high, len(values))


@dataclass(frozen=True)
class Comparison:
    """Two sets of scores of the same questions.

    Attributes:
        difference: mean of the second less the first; `low`, `high`: its 95% interval, by a
            bootstrap over questions.
        lost: questions the second scores lower than the first.
        gained: questions the second scores higher.
        p_value: McNemar's exact test; None where scores are other than 0 and 1.
    """

    difference: float
    low: float
    high: float
    lost: int
    gained: int
    p_value: float | None

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Comparison:
        """Compare scores of the same questions in the same order.

        Raises:
            ValueError: different numbers of scores, or none.
        """
        if len(first) != len(second) or not len(first):
            raise ValueError(f"cannot pair {len(first)} scores with {len(second)}")
        before, after = np.asarray(first, float), np.asarray(second, float)
        change = after - before
        lost, gained = int((change < 0).sum()), int((change > 0).sum())
        binary = _binary(before) and _binary(after)
        low, high = bootstrap(change)
        p_value = mcnemar(lost, gained) if binary else None
        return cls(float(change.mean()), low, high, lost, gained, p_value)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927, without continuity correction)."""
    share, z = right / total, QUANTILE
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    # Exact at the ends, where rounding would leave the last digit.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def bootstrap(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """95% percentile interval of the mean (Efron 1979), the same for the same values and seed."""
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, DRAWN // len(values))
    for start in range(0, resamples, step):
        drawn = random.integers(0, len(values), (min(step, resamples - start), len(values)))
        means[start : start + step] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test: are losses and gains equally likely?

    Args:
        lost: pairs right before and wrong after.
        gained: pairs wrong before and right after.
    """
    discordant, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(discordant, count) for count in range(fewer + 1))
    # Integers until here: a float would overflow from 1,030 pairs on.
    return min(1.0, 2 * tail / (1 << discordant))


def _binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())
