"""Many requests answered together, on the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, cast

from internvl_edge.bundle.errors import InternVLEdgeError
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.request import Reply, Request
from internvl_edge.runtime.decoding.scheduler import Scheduler

#: What became of a request.
Outcome: TypeAlias = Reply | Exception


class Batch:
    """Answers requests together, each as if it were alone.

    Pictures are cut when their request is about to begin, not all at once.

    Args:
        answering: what answers are made with.
    """

    def __init__(self, answering: Answering) -> None:
        self._scheduler = Scheduler(answering, answering.lane)
        self._ahead = 2 * answering.policy.most_running
        self._open: dict[int, Handle] = {}
        self._outcomes: list[Outcome | None] = []

    def replies(self, requests: Iterable[Callable[[], Request]]) -> list[Outcome]:
        """Return what became of each request, in order: its reply, or the error that ended it.

        Args:
            requests: each makes one, and may raise.
        """
        try:
            for make in requests:
                self._take(make)
                self._advance(until=self._ahead)
            self._advance(until=1)
        finally:  # where an interrupt came
            for handle in self._open.values():
                self._scheduler.end(handle)
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _take(self, make: Callable[[], Request]) -> None:
        self._outcomes.append(None)
        place = len(self._outcomes) - 1
        try:
            self._open[place] = self._scheduler.add(make())
        except InternVLEdgeError as error:
            self._outcomes[place] = error

    def _advance(self, *, until: int) -> None:
        """Step until fewer requests are open; of those that have ended, only the outcome is held:
        their pictures are large."""
        while len(self._open) >= until:
            self._scheduler.advance()
            for place, handle in [*self._open.items()]:
                if not handle.alive:
                    self._outcomes[place] = handle.error or handle.reply
                    del self._open[place]


def replies(found: Sequence[Outcome], *, errors: bool) -> list[Reply]:
    """Return the replies; with errors in the places of those that there are not, where asked for.

    Raises:
        InternVLEdgeError: the first of the errors, where they are not asked for.
        Exception: what `progress` raised.
    """
    for one in found:
        if isinstance(one, Exception) and not (errors and isinstance(one, InternVLEdgeError)):
            raise one
    return cast(list[Reply], list(found))
