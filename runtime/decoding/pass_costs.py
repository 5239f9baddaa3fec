"""What decode passes of so many rows take, as measured."""

from __future__ import annotations

from collections.abc import Iterable

#: Passes of one number of rows whose median counts.
_RECENT = 5
#: Passes for which each of these counts: later the machine may be in another state, and one alone
#: may have met something else that ran.
_COUNTS = 50
#: Share of a pass of one row that each further row adds, where none was measured.
_GROWTH = 0.05
#: Share of the passes' time that the search for guesses may take: of a small model's passes Python
#: is a part that shows.
_SEARCHING = 0.01


class _Measured:
    """Passes of one number of rows: the last ones, their median, and when the last one was."""

    def __init__(self) -> None:
        self._recent: tuple[float, ...] = ()
        self.seconds, self.when = 0.0, 0

    def add(self, seconds: float, now: int) -> None:
        kept = self._recent[1 - _RECENT :] if now - self.when <= _COUNTS * _RECENT else ()
        self._recent = recent = (*kept, seconds)
        self.seconds, self.when = sorted(recent)[(len(recent) - 1) // 2], now

    def counts(self, now: int) -> bool:
        """Whether it was measured lately."""
        return now - self.when <= _COUNTS * len(self._recent)


class PassCosts:
    """Seconds that a decode pass takes, by its rows: of the machine at hand, as it now is.

    Several threads may add to one; where they meet, what one of them measured is lost.
    """

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}
        self._passes = 0
        self._allowed = 0.0  # seconds of searching

    def add(self, rows: int, seconds: float) -> None:
        """Note that a pass of `rows` took so long."""
        self._passes += 1
        self._allowed = min(self._allowed + _SEARCHING * seconds, seconds)
        found = self._measured.get(rows) or _Measured()
        found.add(seconds, self._passes)
        self._measured[rows] = found

    def searched(self, seconds: float) -> None:
        """Note that it took so long to find what to guess."""
        self._allowed -= seconds

    @property
    def may_search(self) -> bool:
        """Whether all searches together are a small part of the time."""
        return self._allowed > 0

    def seconds(self, rows: int) -> float:
        """Return what a pass of `rows` takes; from its neighbours where none was measured lately.

        0 where nothing was. One that never was measured is thought to be cheap: so it is tried.
        """
        own = self._measured.get(rows)
        if own is not None and own.counts(self._passes):
            return own.seconds
        return self._between(rows, hopeful=own is None)

    def worst(self, rows: int) -> float:
        """Return what a pass of `rows` may take: as it did at last, however long ago that is."""
        own = self._measured.get(rows)
        return max(self.seconds(rows), 0.0 if own is None else own.seconds)

    def _between(self, rows: int, *, hopeful: bool) -> float:
        known = sorted(self._measured)
        below = self._nearest(other for other in reversed(known) if other < rows)
        above = self._nearest(other for other in known if other > rows)
        if below is None:
            return 0.0 if above is None else above[1]
        if above is None or hopeful:
            return below[1] * (1 + _GROWTH * (rows - below[0]))
        share = (rows - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def _nearest(self, order: Iterable[int]) -> tuple[int, float] | None:
        """Return the first of some numbers of rows that was measured lately, and its seconds."""
        for rows in order:
            if self._measured[rows].counts(self._passes):
                return rows, self._measured[rows].seconds
        return None
