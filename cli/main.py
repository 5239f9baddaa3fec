"""Command line: `internvl-edge demo | inspect | doctor | export | prepare | build | chat | bench`.

Every error a user can cause ends in one line on stderr and exit status 2; Ctrl-C in 130.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, TextIO

from internvl_edge.bundle.disk import full_disk, is_full
from internvl_edge.bundle.errors import InternVLEdgeError, InternVLEdgeWarning, UsageError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.bundle.files import at_home
from internvl_edge.bundle.quoting import LONGEST, named, quoted, reason
from internvl_edge.bundle.signals import signals_held
from internvl_edge.cli.commands import BENCH, COMMANDS, PROGRAM, RENAMED, Command
from internvl_edge.cli.completion import complete_if_asked
from internvl_edge.cli.interrupted import say_interrupted
from internvl_edge.cli.streams import news_at_terminal, open_closed_streams, write_anything

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

USAGE_ERROR = 2
TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    open_closed_streams()
    complete_if_asked()
    words = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    write_anything()
    try:
        with _warnings_in_a_line(), news_at_terminal():
            status = _run(_typed(words))
        sys.stdout.flush()
        return status
    except InternVLEdgeError as error:
        print(f"error: {error.told(flags=True)}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return say_interrupted()
    except BrokenPipeError:
        _drop_output()  # its reader has gone
        return 0
    except MemoryError as error:
        print(f"error: this machine's memory does not suffice: {reason(error)}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        _drop_output()
        place = f"{named(error.filename)}: " if isinstance(error.filename, str) else ""
        full = is_full(error) and error.filename is not None  # else it was the output
        text = full_disk(error, Path()) if full else f"{place}{reason(error)}"
        print(f"error: {text}", file=sys.stderr)
        return USAGE_ERROR


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print our own warnings on stderr like errors, without the place in the code."""
    shown_before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, InternVLEdgeWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            shown_before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _drop_output() -> None:
    """Send what is left in the buffer nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: object) -> NoReturn:
    """Leave through `finally`, so that nothing half-written stays."""
    raise SystemExit(TERMINATED)


@dataclass(frozen=True)
class Typed:
    """A command as typed: its words from the program's name on, and those behind them."""

    path: tuple[str, ...]
    command: Command
    rest: Sequence[str]


def _typed(words: Sequence[str]) -> Typed:
    """Follow the leading words through the table; `help` before them asks for theirs.

    Raises:
        UsageError: the command has another name now.
    """
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    command, depth = COMMANDS, 0
    while depth < len(words) and words[depth] in command.parts:
        command, depth = command.parts[words[depth]], depth + 1
    rest = words[depth:]
    if command.parts is BENCH and rest and rest[0] in RENAMED:
        raise UsageError(f"'bench {rest[0]}' is now 'bench {RENAMED[rest[0]]}'")
    return Typed((PROGRAM, *words[:depth]), command, rest)


def _run(typed: Typed) -> int:
    """Import the command's module, parse what it declares, run it; returns the exit status."""
    if typed.command.module is None:
        _refuse(typed)
    extra = typed.command.extra
    with contextlib.nullcontext() if extra is None else extra_installed(extra):
        with signals_held():
            module = import_module(f"internvl_edge.{typed.command.module}")
        arguments = _parse(typed, module)
        return int(module.run(arguments))


def _refuse(typed: Typed) -> NoReturn:
    """Print the help that is asked for, or that no command is named: only names come here."""
    parser = _Parser(prog=" ".join(typed.path), description=typed.command.help)
    if typed.path == (PROGRAM,):
        parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    parts = parser.add_subparsers(metavar="COMMAND")  # not required: an unknown option is said
    for name, part in typed.command.parts.items():
        parts.add_parser(name, help=part.help, add_help=False)
    if not typed.rest:
        parser.print_help(sys.stderr)
        raise SystemExit(USAGE_ERROR)
    word = typed.rest[0]
    if close := get_close_matches(word, typed.command.parts, 1):
        parser.error(f"there is no command {quoted(word)}; did you mean {quoted(close[0])}?")
    parser.parse_args(typed.rest)
    parser.error("the command stands first")


def _version() -> str:
    try:
        return metadata.version(PROGRAM)
    except metadata.PackageNotFoundError:  # run from a folder, never installed
        return "of no installed package"


def _parse(typed: Typed, module: ModuleType) -> argparse.Namespace:
    """Parse, letting a list such as IMAGES stand behind options (argparse before 3.12 fails).

    A command says with the default `trailing` which of its lists that is.
    """
    parser = _Parser(
        prog=" ".join(typed.path),
        description=typed.command.help,
        epilog=_parts(typed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("type", Path, _path)
    module.add_arguments(parser)
    arguments, rest = parser.parse_known_args(typed.rest)
    trailing = parser.get_default("trailing")
    if rest and (trailing is None or any(word.startswith("-") for word in rest)):
        parser.refuse(rest)
    if trailing is not None:
        setattr(arguments, trailing, [*getattr(arguments, trailing), *rest])
    return arguments


def _path(text: str) -> Path:
    """Return a path as typed; of `--output=~/x` no shell has replaced the `~`."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, it must be a path")
    return Path(at_home(text))


def _parts(typed: Typed) -> str:
    """Return a line about each command below this one."""
    lines = [
        f"{' '.join((*typed.path, name))}\n  {part.help}"
        for name, part in typed.command.parts.items()
    ]
    return "\n".join(["more commands:", *lines]) if lines else ""


class _Parser(argparse.ArgumentParser):
    def print_usage(self, file: SupportsWrite[str] | None = None) -> None:
        """Print what stands beside an error: not all the options, which `--help` lists."""
        formatter = argparse.HelpFormatter(f"{self.prog} [OPTION ...]")
        words = [action for action in self._actions if not action.option_strings]
        formatter.add_usage(None, words, [])
        print(formatter.format_help(), end="", file=sys.stderr if file is None else file)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Exit with the words that mean nothing here, and what the first may have been meant as."""
        close = get_close_matches(words[0].partition("=")[0], self._option_string_actions, 1)
        meant = f"; did you mean {quoted(close[0])}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{meant}")

    def error(self, message: str) -> NoReturn:
        """Exit with the message, which may hold an argument of any length."""
        super().error(message if len(message) <= 3 * LONGEST else f"{message[: 3 * LONGEST]}...")
