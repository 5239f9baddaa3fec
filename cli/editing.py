"""Lines typed at a terminal: edited, remembered for the session, completed."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence

#: Characters that end a word to be completed: a path with blanks is one.
_BETWEEN_WORDS = "\t\n"


def edit_lines(commands: Sequence[str]) -> None:
    """Let `input` edit its lines, where Python has readline: Windows and some builds do not.

    Lines are remembered until the program ends, and nowhere else.

    Args:
        commands: words that begin a line and are completed with the Tab key, as paths behind them.
    """
    try:
        import readline
    except ImportError:
        return
    readline.set_completer_delims(_BETWEEN_WORDS)
    readline.set_completer(_completer(commands))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """Return what a line may be completed to."""
    word, blank, start = line.partition(" ")
    if not blank:
        return [f"{command} " for command in commands if line and command.startswith(line)]
    if word not in commands:
        return []
    typed = os.path.expanduser(start)
    found = sorted(glob.glob(f"{glob.escape(typed)}*"))
    return [
        f"{word} {start}{path[len(typed) :]}{os.sep if os.path.isdir(path) else ''}"
        for path in found
    ]


def _completer(commands: Sequence[str]) -> Callable[[str, int], str | None]:
    """A completer as readline wants it: the `state`-th completion of the line."""

    def complete(line: str, state: int) -> str | None:
        found = completions(line, commands)
        return found[state] if state < len(found) else None

    return complete
