"""Lines typed at a terminal: edited, recalled, completed."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

#: Characters that end a word to be completed: a path with blanks is one.
_BETWEEN_WORDS = "\t\n"


def edit_lines(commands: Sequence[str], earlier: Sequence[str]) -> None:
    """Let `input` edit its lines, where Python has readline: Windows and some builds do not.

    Args:
        commands: words that begin a line and are completed with the Tab key, as paths behind them.
        earlier: lines that can be recalled, oldest first.
    """
    try:
        import readline
    except ImportError:
        return
    readline.set_completer_delims(_BETWEEN_WORDS)
    readline.set_completer(_completer(commands))
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    for line in earlier:
        with suppress(ValueError):  # of characters that this terminal lacks, or NUL
            readline.add_history(line)


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
