"""The `inspect` command: what a checkpoint or bundle is, and whether its engines build."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.errors import CheckpointError, UsageError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.bundle.quoting import named
from internvl_edge.cli.streams import print_json, terminal_width
from internvl_edge.runtime.inspection import inspect_bundle, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("path", type=Path, metavar="CHECKPOINT|BUNDLE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--check",
        action="store_true",
        help="of a bundle for TensorRT: run it on the CPU, build its engines without a GPU",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="BUNDLE", help="the same, exported --for onnxruntime"
    )
    parser.add_argument("--all-gpus", action="store_true", help="build for every GPU generation")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns the exit status.

    Raises:
        UsageError: an option of `--check` without it.
        CheckpointError: there is no such folder.
        MissingExtraError: what reads a checkpoint is not installed.
    """
    if arguments.check:
        return _check(arguments)
    if arguments.reference is not None or arguments.all_gpus:
        raise UsageError("--reference and --all-gpus go with inspect --check; add --check")
    if not arguments.path.is_dir():
        raise CheckpointError(
            f"{named(arguments.path)} is not a checkpoint directory and no bundle: it is no folder"
        )
    if (arguments.path / MANIFEST).exists():
        report = inspect_bundle(arguments.path)
    else:
        with extra_installed("export"):
            from internvl_edge.export.inspection import inspect_checkpoint
        report = inspect_checkpoint(arguments.path)
    if arguments.json:
        print_json(report, indent=2)
    else:
        print(render(report, terminal_width()))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Return exit status 1 where the bundle was checked and does not pass."""
    with extra_installed("export"):
        from internvl_edge.export.tensorrt.gate import check_bundle, render_gate
        from internvl_edge.export.tensorrt.rtx import CAPABILITIES

    report = check_bundle(
        arguments.path,
        reference=arguments.reference,
        capabilities=CAPABILITIES if arguments.all_gpus else CAPABILITIES[:1],
    )
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else render_gate(report))
    return 1 if report.failures else 0
