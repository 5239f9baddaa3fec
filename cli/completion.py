"""Completion with the Tab key, through argcomplete: commands, options, their values, paths."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

from internvl_edge.cli.commands import COMMANDS, PROGRAM, Command

#: What argcomplete's shell function sets; nothing is completed without it.
ASKED = "_ARGCOMPLETE"


def complete_if_asked() -> None:
    """Print what the shell's line may go on with and leave, where the shell asks for it.

    `register-python-argcomplete internvl-edge` prints what makes the shell ask.
    """
    if ASKED not in os.environ:
        return
    try:
        import argcomplete
        from argcomplete.lexers import split_line
    except ImportError:  # the shell was told so by another environment
        raise SystemExit(1) from None
    point = int(os.environ.get("COMP_POINT", "0"))
    line = os.environ.get("COMP_LINE", "")
    words = split_line(line, point)[3]
    argcomplete.autocomplete(line_parser(words[1:]), always_complete_options=False)


def line_parser(words: list[str]) -> argparse.ArgumentParser:
    """Return a parser of a whole line, in which the command that is typed has its options.

    Args:
        words: those that are whole, behind the program's name.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM)
    _fill(parser, COMMANDS, words)
    return parser


def _fill(parser: argparse.ArgumentParser, command: Command, words: list[str]) -> None:
    """Give a parser the commands below one, or the options of the one that is typed."""
    deeper = bool(words) and words[0] in command.parts
    if command.module is not None and not deeper:
        try:
            module = import_module(f"internvl_edge.{command.module}")
        except ModuleNotFoundError:  # of an extra: its command says so when it is run
            return
        module.add_arguments(parser)
        return
    parts = parser.add_subparsers()
    for name, part in command.parts.items():
        below = parts.add_parser(name, help=part.help)
        if deeper and name == words[0]:
            _fill(below, part, words[1:])
