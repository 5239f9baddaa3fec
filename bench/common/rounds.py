"""Which rounds of a run count: those around which the machine gave the same.

A neighbour on a shared host, or a processor that gets hot, moves every figure by more than most
changes of code do. What it leaves of the memory's bandwidth shows it: that is read between rounds,
and rounds in another state than most are measured again instead of widening every spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from internvl_edge.bench.common.machine import MOST_DRIFT

#: Rounds measured at most for each one asked for.
MOST_ROUNDS = 3

Found = TypeVar("Found")


@dataclass(frozen=True)
class Rounds(Generic[Found]):
    """The rounds that were measured, and which of them count.

    Attributes:
        found: of each round.
        read_bytes_per_s: the memory's bandwidth before the first round and after each.
        kept: which rounds count: the steady ones, or all where there were too few of these.
        steady: whether these are the steady ones.
    """

    found: list[Found]
    read_bytes_per_s: list[float]
    kept: list[int]
    steady: bool

    @property
    def counted(self) -> list[Found]:
        return [self.found[i] for i in self.kept]

    @property
    def ceiling(self) -> float:
        """The best bandwidth around the rounds that count: what they could have had."""
        return max(self._around(self.kept))

    @property
    def note(self) -> str | None:
        """Return a warning for the reader; None after rounds of which each counts."""
        if not self.steady:
            return (
                f"memory was read at {_span(self.read_bytes_per_s)} between rounds: other work, of"
                " another virtual machine perhaps, shares it; what it bounds varies as much"
            )
        if len(self.kept) == len(self.found):
            return None
        return (
            f"{len(self.found) - len(self.kept)} of {len(self.found)} rounds do not count: memory"
            f" was read at {_span(self._around(self.kept))} around the others, at"
            f" {_span(self.read_bytes_per_s)} in all"
        )

    def _around(self, rounds: Sequence[int]) -> list[float]:
        return [self.read_bytes_per_s[i + after] for i in rounds for after in (0, 1)]


def measure_rounds(
    wanted: int, measure: Callable[[int], Found], read: Callable[[], float]
) -> Rounds[Found]:
    """Measure until `wanted` rounds were steady, at most `MOST_ROUNDS` times as many.

    Args:
        measure: one round, given its number.
        read: the memory's bandwidth now.
    """
    found: list[Found] = []
    bandwidth = [read()]
    kept: list[int] = []
    while len(kept) < wanted and len(found) < MOST_ROUNDS * wanted:
        found.append(measure(len(found)))
        bandwidth.append(read())
        kept = steady_rounds(bandwidth)
    steady = len(kept) == wanted
    return Rounds(found, bandwidth, kept if steady else list(range(len(found))), steady)


def steady_rounds(bandwidth: Sequence[float]) -> list[int]:
    """The largest set of rounds with all readings around them within `MOST_DRIFT` of each other.

    Args:
        bandwidth: before the first round and after each. Of equal sets, that of the higher ones
            is taken: less of the machine was someone else's.
    """
    best: list[int] = []
    for low in sorted(bandwidth):
        inside = [low <= reading <= MOST_DRIFT * low for reading in bandwidth]
        kept = [i for i, both in enumerate(pairwise(inside)) if all(both)]
        if len(kept) >= len(best):
            best = kept
    return best


def _span(bandwidth: Sequence[float]) -> str:
    return f"{min(bandwidth) / 1e9:.1f} to {max(bandwidth) / 1e9:.1f} GB/s"
