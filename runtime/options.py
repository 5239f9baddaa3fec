"""Options that commands of several rooms share, and value objects made of parsed options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, get_args

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.runtime.devices import MOST_THREADS, Device

Value = TypeVar("Value")

#: What options are added to: a command's parser, or a part of its help.
ArgumentGroup = argparse._ActionsContainer


def add_device(parser: ArgumentGroup) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default="auto",
        help="auto takes the GPU where it works, else the CPU",
    )
    add_threads(parser)


def add_threads(parser: ArgumentGroup) -> None:
    """Add `--threads`."""
    parser.add_argument(
        "--threads",
        type=at_least(1, "--threads", most=MOST_THREADS),
        help="CPU threads (default: one per core)",
    )


def at_least(least: int, option: str, *, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an option that takes an integer from `least` on, to `most` where given.

    The type raises UsageError for another one.
    """

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise UsageError(f"{option} is {quoted(value)}, it must be at least {least}")
        if most is not None and value > most:
            raise UsageError(f"{option} is {quoted(value)}, it must be at most {most}")
        return value

    return integer


def filled(kind: Callable[..., Value], arguments: argparse.Namespace) -> Value:
    """Return a dataclass whose fields are the parsed options of the same names."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    return kind(**values)
