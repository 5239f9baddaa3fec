"""The `doctor` command: what this machine runs with, for a bug report."""

from __future__ import annotations

import argparse

from internvl_edge.cli.streams import print_json, terminal_width
from internvl_edge.runtime.doctor import examine
from internvl_edge.runtime.inspection import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    report = examine()
    if arguments.json:
        print_json(report, indent=2)
    else:
        print(render(report, terminal_width()))
    return 0
