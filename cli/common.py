"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from internvl_edge.bundle.errors import LimitError
from internvl_edge.bundle.quoting import quoted

#: What `ArgumentParser.add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto")
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")


def check_threads(threads: int | None) -> None:
    """Raise LimitError for a number of threads below one."""
    if threads is not None and threads < 1:
        raise LimitError(f"--threads is {quoted(threads)}, it must be at least 1")
