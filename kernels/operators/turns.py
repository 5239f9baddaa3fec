"""Turns of passes over tokens and over tiles; see turns.h."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """The turns of this process: those of its library of operators.

    Args:
        library: whose operators rest; see `build.operator_library`.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it has no turns.
    """

    def __init__(self, library: Path) -> None:
        # Calls wait without Python's lock.
        self._library = ctypes.CDLL(str(library))
        self._library.ive_turns_enter.restype = ctypes.c_double
        self._library.ive_turns_enter.argtypes = [ctypes.c_double]

    @contextmanager
    def tiles(self) -> Iterator[None]:
        """Around a pass over tiles, in a thread that no interrupt comes to."""
        self._library.ive_turns_begin_tiles()
        try:
            yield
        finally:
            self._library.ive_turns_end_tiles()

    def rest(self) -> None:
        """Wait, as an operator of a pass over tiles does at its beginning, while tokens are run."""
        self._library.ive_turns_rest()

    def enter(self, share: float) -> float | None:
        """Begin a pass over tokens.

        Args:
            share: seconds for tiles since the last one.

        Returns:
            seconds that it waited for operators after that; None: no tiles are under way.
        """
        rested = float(self._library.ive_turns_enter(share))
        return None if rested < 0 else rested

    def leave(self) -> None:
        """End a pass over tokens; one that an interrupt left without this ends by itself."""
        self._library.ive_turns_leave()
