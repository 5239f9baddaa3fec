"""What the command line's files share: common options, and the error of an absent extra."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from internvl_edge.runtime.errors import ExportError, LimitError
from internvl_edge.runtime.quoting import quoted

#: What `ArgumentParser.add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@contextmanager
def export_installed(extra: str = "export") -> Iterator[None]:
    """Turn a missing package of an extra into an error that names the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f"this command needs the package {error.name}: pip install 'internvl-edge[{extra}]'"
        ) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto")
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")


def check_threads(threads: int | None) -> None:
    """Raise LimitError for a number of threads below one."""
    if threads is not None and threads < 1:
        raise LimitError(f"--threads is {quoted(threads)}, it must be at least 1")
