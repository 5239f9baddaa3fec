"""A thread that does what it is handed, whenever those who hand it in are interrupted."""

from __future__ import annotations

import _thread
import atexit
import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from internvl_edge.runtime.process import HomeProcess

#: What is done; None ends the thread.
Job = Callable[[], object]
Jobs = SimpleQueue["Job | None"]

_log = logging.getLogger("internvl_edge")


class Worker:
    """Does one job after the other in a thread that begins with the first, and ends with the worker
    or by `close`. The process waits for the job under way; one forked from it has no such thread,
    and waits for none.

    An interrupt within `submit` of an executor leaves its semaphore locked, and its thread, and
    whoever submits next, wait for ever. Here nothing is locked in Python.

    Args:
        name: of the thread.
        begin: called in the thread before its first job.
    """

    def __init__(self, name: str, begin: Job = lambda: None) -> None:
        self._name, self._begin, self._begun = name, begin, False
        self._jobs: Jobs = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._turn = threading.Lock()
        self._threads: set[int] = set()  # by their numbers: two where an interrupt came in between
        self._home = HomeProcess()
        leave = partial(_wait_for, self._jobs, self._turn, self._home)
        atexit.register(leave)
        weakref.finalize(self, _end, self._jobs, leave).atexit = False

    def submit(self, job: Job) -> None:
        """Have a job done; where an interrupt comes in between, perhaps with the next one."""
        self._jobs.put(job)
        if not self._begun:  # where an interrupt comes in between, two take turns
            given = self._jobs, self._ended, self._turn, self._threads
            serve = partial(_serve, *given, self._begin)
            # A thread waits for another to have begun: one that no interrupt comes to.
            _thread.start_new_thread(_start, (self._name, serve))
            self._begun = True

    def close(self) -> None:
        """Wait for what was handed in, and for the end of the thread; a job does not, which would
        wait for itself."""
        self._jobs.put(None)
        if self._begun and self._home.here and threading.get_ident() not in self._threads:
            self._ended.get()


def _start(name: str, serve: Job) -> None:
    threading.Thread(target=serve, name=name, daemon=True).start()


def _serve(
    jobs: Jobs, ended: SimpleQueue[None], turn: threading.Lock, threads: set[int], begin: Job
) -> None:
    threads.add(threading.get_ident())
    begin()
    with turn:
        while (job := jobs.get()) is not None:
            try:
                job()
            except Exception:  # noqa: BLE001 - told, and others go on
                _log.exception("a thread goes on with what is next")
            del job  # which holds what the worker is of
    jobs.put(None)  # for another one
    ended.put(None)


def _end(jobs: Jobs, leave: Job) -> None:
    jobs.put(None)
    atexit.unregister(leave)


def _wait_for(jobs: Jobs, turn: threading.Lock, home: HomeProcess) -> None:
    if not home.here:
        return
    jobs.put(None)
    with turn:
        pass
