"""One line of progress on a terminal, gone before anything else is written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType

from internvl_edge.runtime.decoding.progress import Progress


class ProgressLine(AbstractContextManager["ProgressLine"]):
    """Shows on standard error how far a prompt is, where that is a terminal.

    Args:
        wanted: False shows nothing.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._wanted = wanted and sys.stderr.isatty()
        self._shown = ""

    def __call__(self, progress: Progress) -> None:
        """Take news of a prompt; see `InternVL.stream`."""
        if self._wanted:
            self._write(told(progress))

    def clear(self) -> None:
        """Take the line away."""
        self._write("")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear()

    def _write(self, text: str) -> None:
        if text == self._shown:
            return
        blank = " " * len(self._shown)
        print(f"\r{blank}\r{text}", end="", file=sys.stderr, flush=True)
        self._shown = text


def told(progress: Progress) -> str:
    """Return what is being done now; "" when all is."""
    if progress.done >= progress.total:
        return ""
    if progress.stage == "tiles":
        return f"tile {progress.done + 1} of {progress.total}"
    return f"reading the prompt: {progress.done} of {progress.total} tokens"
