"""Ctrl-C while libraries are imported: some abort, crash or stay half there where it interrupts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C and the request to end back until a library has been imported.

    This thread is not interrupted meanwhile. Others, as those of NumPy's BLAS, take a signal in its
    place, and Python would have this one answer it: what comes that way is noted and told again.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        with _noted():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """Note held signals that other threads take; tell them again, which waits to be let through."""
    if threading.current_thread() is not threading.main_thread():  # Python answers none here
        yield
        return
    came: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        came.add(number)

    handlers = {number: signal.getsignal(number) for number in _HELD}
    answered = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (None, signal.SIG_IGN)
    }
    try:
        for number in answered:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in answered.items():
            signal.signal(number, handler)
        for told in came:
            signal.raise_signal(told)
