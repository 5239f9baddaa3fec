"""Answers for asyncio: awaited whole, or read piece by piece."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable

from internvl_edge.bundle.errors import UsageError
from internvl_edge.runtime.decoding.background import Background, News, Ticket
from internvl_edge.runtime.decoding.request import Event, Reply, Request
from internvl_edge.runtime.decoding.thinking import Piece, pieces_of
from internvl_edge.runtime.process import NotCopied


class AsyncStream(NotCopied, AsyncIterator[Piece]):
    """An answer in the making: iterate over its text pieces with `async for`, or await `finish()`.

    It begins when it is first read, belongs to one event loop and one task at a time, and is
    cancelled with the task that reads it, by `cancel`, and when nobody refers to it any more.

    Args:
        background: answers.
        prepare: makes the request; run in the event loop's executor, since it decodes pictures.

    Raises:
        ImageError, PromptError, LimitError, PrecisionError: where it is read.
        UsageError: another task is reading it.
    """

    def __init__(self, background: Background, prepare: Callable[[], Request]) -> None:
        self._background, self._prepare = background, prepare
        self._news: asyncio.Queue[News] | None = None
        self._ticket: Ticket | None = None
        self._give_up: weakref.finalize[[Ticket], AsyncStream] | None = None
        self._cancelled = self._read = False
        self._pieces: deque[Piece] = deque()
        self._reply: Reply | None = None
        self._ended = False

    @property
    def reply(self) -> Reply | None:
        """The reply once the answer has ended, else None."""
        return self._reply

    def cancel(self) -> None:
        """Ask for the end of the answer; what there is of it can still be read."""
        self._cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()

    async def finish(self) -> Reply:
        """Wait for what is left and return the whole reply."""
        async for _ in self:
            pass
        if self._reply is None:
            raise UsageError("this answer was ended by an error; ask again")
        return self._reply

    async def __anext__(self) -> Piece:
        if self._read:  # the other would wait for what this one hears
            raise UsageError("this answer is being read by another task; read it in one")
        self._read = True
        try:
            while not self._ended and not self._pieces:
                self._hear(await self._next())
            if self._pieces:
                return self._pieces.popleft()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._read = False
        raise StopAsyncIteration

    async def _next(self) -> News:
        if self._news is None:
            self._news = asyncio.Queue()
            loop = asyncio.get_running_loop()
            try:
                request = await loop.run_in_executor(None, self._prepare)
                ticket = self._background.hand_in(request, _teller(loop, self._news))
            except BaseException:
                self._news = None
                raise
            self._ticket = ticket
            self._give_up = weakref.finalize(self, Ticket.cancel, ticket)
            if self._cancelled:
                self.cancel()
        return await self._news.get()

    def _hear(self, news: News) -> None:
        if isinstance(news, Event):
            self._pieces.extend(pieces_of([news]))
            return
        # Nothing holds on to what has ended: not the ticket, nor what would cancel it.
        self._ticket = None
        if self._give_up is not None:
            self._give_up.detach()
        self._ended = True
        if not isinstance(news, Reply):
            try:
                raise news
            finally:
                del news  # the error holds this frame
        self._reply = news


def _teller(
    loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[News]
) -> Callable[[News], object]:
    """Return what puts news into a queue of an event loop, from another thread."""
    return lambda news: loop.call_soon_threadsafe(queue.put_nowait, news)
