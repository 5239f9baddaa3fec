"""A wait that is ended from anywhere."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue


class Waking:
    """Lets one thread wait until somebody wakes it: another thread, a signal's handler, or the end
    of an object, which Python runs in the midst of anything.

    No lock is held meanwhile that these would wait for, or that an interrupt would leave locked, as
    `threading.Event` has one.
    """

    def __init__(self) -> None:
        self._told: SimpleQueue[None] = SimpleQueue()

    def wake(self) -> None:
        """End the wait under way, or else the next one."""
        self._told.put(None)

    def forget(self) -> None:
        """Let only what comes from now on end the next wait."""
        with suppress(Empty):
            while True:
                self._told.get_nowait()

    def wait(self, seconds: float) -> None:
        """Wait to be woken, at most so long."""
        with suppress(Empty):
            self._told.get(timeout=seconds)
