"""Terminals and pipes of any encoding: what they cannot show is replaced, never an error."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def open_closed_streams() -> None:
    """Put the null device where a standard stream was closed before the program began.

    A file opened later would have its number, and what is printed would go there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def write_anything() -> None:
    """Let the standard streams write and read any text.

    Answers are Unicode, and paths may hold bytes that are no text: after an export or an answer of
    minutes, one character that a terminal lacks must not end the command. What is typed at an
    ASCII terminal is read as UTF-8, of which ASCII is a part.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and _encoding(sys.stdin) == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def print_json(value: object, *, indent: int | None = None) -> None:
    """Print a value as JSON, escaped where standard output does not take every character."""
    unicode = _encoding(sys.stdout) in ("utf-8", "utf-16", "utf-32")
    print(json.dumps(value, indent=indent, ensure_ascii=not unicode), flush=True)


def terminal_width() -> int | None:
    """Return how many columns standard output has; None where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@contextmanager
def news_at_terminal() -> Iterator[None]:
    """Show on standard error what takes time and is done once, where that is a terminal."""
    log = logging.getLogger("internvl_edge")
    if not sys.stderr.isatty():
        yield
        return
    level, handler = log.level, logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _encoding(stream: object) -> str:
    name = getattr(stream, "encoding", None) or "utf-8"
    try:
        return codecs.lookup(name).name
    except LookupError:
        return name
