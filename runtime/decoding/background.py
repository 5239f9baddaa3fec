"""Requests of many callers answered together, on a thread that runs while there are any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.decoding.failures import Escaped, contained
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.request import Event, Reply, Request
from internvl_edge.runtime.decoding.scheduler import Scheduler
from internvl_edge.runtime.decoding.worker import Worker

#: What a request is told: text of its answer, and at last the reply or what ended it instead.
News: TypeAlias = Event | Reply | BaseException


@dataclass(eq=False)
class Ticket:
    """A request that was handed in.

    Attributes:
        request: what is asked.
        tell: called with what became of it, from the background's thread. What it raises cancels
            the request.
        handle: of the scheduler, once it has it.
        cancelled: whether the end was asked for.
    """

    request: Request
    tell: Callable[[News], object]
    handle: Handle | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Ask for the end of the answer; safe from anywhere, see `Waking`."""
        self.cancelled = True
        if (handle := self.handle) is not None:
            handle.cancel()

    def inform(self, news: News) -> None:
        """Tell the caller; one who cannot hear it any more wants no answer."""
        try:
            self.tell(news)
        except Exception:  # noqa: BLE001 - a caller's; it is gone, and others go on
            self.cancel()


class Background:
    """Answers what it is handed, together, in a thread of its own. Thread-safe.

    The thread begins with the first request, waits while there is none, and ends with the model or
    by `close`.

    Args:
        answering: what answers are made with.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._lock = threading.Lock()
        self._new: list[Ticket] = []
        self._all: set[Ticket] = set()
        self._scheduler: Scheduler | None = None
        self._thread = Worker("answers")

    def hand_in(self, request: Request, tell: Callable[[News], object]) -> Ticket:
        """Take a request; see `Ticket`.

        Raises:
            ProcessError: the model was loaded in another process.
        """
        self._answering.home.check()
        if request.progress is not None:
            request = replace(request, progress=contained(request.progress))
        ticket = Ticket(request, tell)
        with self._lock:
            self._new.append(ticket)
            self._all.add(ticket)
            if self._scheduler is None:  # where an interrupt comes in between, two take turns
                scheduler = Scheduler(self._answering, self._answering.lane)
                self._thread.submit(partial(self._until_done, scheduler))
                self._scheduler = scheduler
            self._scheduler.wake()
        return ticket

    def close(self) -> None:
        """Cancel all requests and end the thread; another begins with the next request."""
        with self._lock:
            for ticket in self._all:
                ticket.cancel()
            thread, self._thread = self._thread, Worker("answers")
        thread.close()

    def _until_done(self, scheduler: Scheduler) -> None:
        running: dict[Request, Ticket] = {}
        while self._took(scheduler, running):
            for event in self._step(scheduler, running):
                if (ticket := running.get(event.request)) is not None:
                    ticket.inform(event)
            for ticket in [*running.values()]:
                self._settle(ticket, running)

    def _took(self, scheduler: Scheduler, running: dict[Request, Ticket]) -> bool:
        """Take what is new; whether there is anything to do."""
        with self._lock:
            new, self._new = self._new, []
            if not new and not running:
                self._scheduler = None
                return False
        for ticket in new:
            try:
                ticket.handle = scheduler.add(ticket.request)
            except Exception as error:  # noqa: BLE001 - the caller's to know, on its own thread
                self._end(ticket, error)
                continue
            running[ticket.request] = ticket
            if ticket.cancelled:  # before it had a handle
                ticket.handle.cancel()
        return True

    def _step(self, scheduler: Scheduler, running: dict[Request, Ticket]) -> list[Event]:
        try:
            return scheduler.advance()
        except Exception as error:  # noqa: BLE001 - not one request's: none of them can go on
            for ticket in running.values():
                if ticket.handle is not None:
                    scheduler.fail(ticket.handle, error)
            return []

    def _settle(self, ticket: Ticket, running: dict[Request, Ticket]) -> None:
        """Tell the end of a request that has ended."""
        handle = ticket.handle
        if handle is not None and not handle.alive:
            del running[ticket.request]
            news = handle.error if handle.reply is None else handle.reply
            assert news is not None
            self._end(ticket, news)

    def _end(self, ticket: Ticket, news: News) -> None:
        with self._lock:
            self._all.discard(ticket)
        ticket.inform(news.error if isinstance(news, Escaped) else news)
