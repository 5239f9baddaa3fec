"""Figures from repeated runs: pure functions, and one that runs a task by a clock it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Clock = Callable[[], float]
Result = TypeVar("Result")

#: Beyond so many interquartile ranges from the quartiles a run is an outlier (Tukey 1977).
FENCE = 1.5


@dataclass(frozen=True)
class Summary:
    """Statistics of repeated runs of one phase, in the unit of the samples.

    Attributes:
        samples: every run in order, warm-up excluded.
        outliers: runs beyond the fences; they are counted, not dropped.
    """

    samples: tuple[float, ...]
    median: float
    p25: float
    p75: float
    p90: float
    p99: float
    mean: float
    minimum: float
    maximum: float
    outliers: int

    @property
    def spread(self) -> float:
        """Interquartile range."""
        return self.p75 - self.p25


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly (Hyndman and Fan's definition 7, as NumPy's).

    Raises:
        ValueError: no values, or `percent` outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summarise(values: Sequence[float]) -> Summary:
    """Median, quartiles, tails and outliers of at least one value."""
    p25, median, p75, p90, p99 = (percentile(values, p) for p in (25, 50, 75, 90, 99))
    reach = FENCE * (p75 - p25)
    return Summary(
        samples=tuple(values),
        median=median,
        p25=p25,
        p75=p75,
        p90=p90,
        p99=p99,
        mean=math.fsum(values) / len(values),
        minimum=min(values),
        maximum=max(values),
        outliers=sum(not p25 - reach <= value <= p75 + reach for value in values),
    )


def repeat(task: Callable[[], Result], *, runs: int, warmup: int) -> list[Result]:
    """Results of `runs` calls; those of `warmup` earlier ones are thrown away."""
    for _ in range(warmup):
        task()
    return [task() for _ in range(runs)]


def timed(
    task: Callable[[], object], *, runs: int, warmup: int, clock: Clock = time.perf_counter
) -> list[float]:
    """Seconds of each of `runs` calls after `warmup` untimed ones."""

    def once() -> float:
        started = clock()
        task()
        return clock() - started

    return repeat(once, runs=runs, warmup=warmup)
