"""Values in error messages: short, on one line, whatever they are."""

from __future__ import annotations

import os
import reprlib

#: Most characters of one value that a message shows.
LONGEST = 200

_CUT = "..."


def quoted(value: object) -> str:
    """Return a value as Python writes it, at most `LONGEST` characters, on one line."""
    if isinstance(value, (str, bytes)):
        return _cut(repr(value[: LONGEST + 1]))  # never the whole of it
    if isinstance(value, int) and abs(value) >= 10**LONGEST:  # Python may refuse to write it
        return f"a number of {value.bit_length()} bits"
    return _cut(_brief().repr(value))


def named(path: str | os.PathLike[str]) -> str:
    """Return a path, or a name, without its middle where it is longer than `LONGEST`."""
    text = str(path)
    if not text.isprintable():  # a line break, or a byte that is not UTF-8
        text = repr(text)[1:-1]
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - len(_CUT)) // 2
    return f"{text[:half]}{_CUT}{text[-half:]}"


def reason(error: BaseException) -> str:
    """Return what another library's error says, at most `LONGEST` characters, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _cut(str(text))


def _cut(text: str) -> str:
    line = " ".join(text[: 10 * LONGEST].split())
    return line if len(line) <= LONGEST else line[: LONGEST - len(_CUT)] + _CUT


def _brief() -> reprlib.Repr:
    """A `repr` that stops early: values may be deep, long, or slow to write."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxtuple, brief.maxdict = 4, 12, 12, 8
    brief.maxstring = brief.maxother = LONGEST
    return brief
