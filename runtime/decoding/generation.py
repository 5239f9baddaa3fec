"""An answer read piece by piece, over a scheduler of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.decoding.request import Reply, Request
from internvl_edge.runtime.decoding.scheduler import Scheduler
from internvl_edge.runtime.decoding.thinking import Piece, pieces_of
from internvl_edge.runtime.process import NotCopied


class TokenStream(NotCopied, Iterator[Piece]):
    """An answer in the making: iterate over its text pieces, or `finish` it at once.

    Each piece is a string that says whether it is of the reasoning before the answer.

    `cancel` may be called from another thread, or by a signal's handler; the answer then ends after
    the pass under way.

    Raises:
        PromptError, LimitError, ProcessError: the request cannot be answered.
    """

    def __init__(self, answering: Answering, request: Request) -> None:
        self._home = answering.home
        self._scheduler = Scheduler(answering)
        self._handle = self._scheduler.add(request)
        self._pieces: deque[Piece] = deque()

    def __next__(self) -> Piece:
        try:
            while self._handle.alive and not self._pieces:
                self._pieces.extend(pieces_of(self._scheduler.step()))
            if self._pieces:
                return self._pieces.popleft()
        except KeyboardInterrupt:
            self._scheduler.end(self._handle)
            raise
        self._home.check()
        self._scheduler.end(self._handle)
        raise StopIteration

    def cancel(self) -> None:
        """Ask the loop to end; safe from any thread, and in a signal's handler."""
        self._handle.cancel()

    def finish(self) -> Reply:
        """Generate what is left and return the whole reply."""
        for _ in self:
            pass
        return self.close()

    def close(self) -> Reply:
        """Stop here; the reply holds what was generated so far."""
        self._home.check()
        self._scheduler.end(self._handle)
        assert self._handle.reply is not None
        return self._handle.reply

    @property
    def reply(self) -> Reply | None:
        """The reply once the answer has ended, else None."""
        return self._handle.reply

    @property
    def failed(self) -> bool:
        """Whether an error ended the answer."""
        return self._handle.failed
