"""Many requests answered together, on the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from internvl_edge.bundle.errors import InternVLEdgeError
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.request import Reply, Request
from internvl_edge.runtime.decoding.scheduler import Scheduler


class Batch:
    """Answers requests together, each as if it were alone.

    Pictures are cut when their request is about to begin, not all at once.

    Args:
        answering: what answers are made with.
    """

    def __init__(self, answering: Answering) -> None:
        self._scheduler = Scheduler(answering, answering.lane)
        self._ahead = 2 * answering.policy.most_running
        self._taken: list[Handle | InternVLEdgeError] = []

    def replies(self, requests: Iterable[Callable[[], Request]]) -> list[Reply | InternVLEdgeError]:
        """Return what became of each request, in order: its reply, or the error that ended it.

        Args:
            requests: each makes one, and may raise.
        """
        try:
            for make in requests:
                self._take(make)
                while self._scheduler.load >= self._ahead:
                    self._scheduler.advance()
            while self._scheduler.load:
                self._scheduler.advance()
        finally:  # where an interrupt came
            for taken in self._taken:
                if isinstance(taken, Handle):
                    self._scheduler.end(taken)
        return [_outcome(taken) for taken in self._taken]

    def _take(self, make: Callable[[], Request]) -> None:
        try:
            self._taken.append(self._scheduler.add(make()))
        except InternVLEdgeError as error:
            self._taken.append(error)


def _outcome(taken: Handle | InternVLEdgeError) -> Reply | InternVLEdgeError:
    if not isinstance(taken, Handle):
        return taken
    if taken.error is not None:
        if not isinstance(taken.error, InternVLEdgeError):
            raise taken.error
        return taken.error
    assert taken.reply is not None
    return taken.reply


def replies(found: Sequence[Reply | InternVLEdgeError], *, errors: bool) -> list[Reply]:
    """Return the replies; with errors in the places of those that there are not, where asked for.

    Raises:
        InternVLEdgeError: the first of the errors, where they are not asked for.
    """
    for one in found:
        if isinstance(one, InternVLEdgeError) and not errors:
            raise one
    return cast(list[Reply], list(found))
