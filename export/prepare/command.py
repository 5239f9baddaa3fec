"""The `prepare` command: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--overwrite", action="store_true", help="write it again")


def run(arguments: argparse.Namespace) -> int:
    """Pack the bundle's weights for this machine; returns the exit status."""
    from internvl_edge.export.prepare.prepare import ALL_MAPPED, all_mapped, prepare_bundle
    from internvl_edge.export.progress import progress_bar

    if all_mapped(arguments.bundle):
        print(ALL_MAPPED)
        return 0
    with progress_bar("prepare") as progress:
        path = prepare_bundle(arguments.bundle, overwrite=arguments.overwrite, progress=progress)
    print(f"prepared {path}")
    return 0
