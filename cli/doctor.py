"""The `doctor` command: what this machine runs with, for a bug report."""

from __future__ import annotations

import argparse
import json

from internvl_edge.runtime.doctor import examine
from internvl_edge.runtime.inspection import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    report = examine()
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else render(report))
    return 0
