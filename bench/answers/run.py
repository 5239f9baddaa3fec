"""The `bench accuracy` command: your questions to one bundle or two, or the table of tiny_ocr."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_edge.bench.answers.accuracy import run_accuracy
from internvl_edge.bench.answers.evaluation import Engine, RunOptions, run_evaluation
from internvl_edge.bench.answers.metrics import metrics
from internvl_edge.bundle.errors import UsageError
from internvl_edge.runtime.options import add_device, filled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.description = (
        "With BUNDLE and --data: score one bundle, or two beside each other. Without: exact match"
        "\nof the tiny_ocr example at every precision."
    )
    parser.add_argument("bundles", nargs="*", default=[], metavar="BUNDLE")
    data = parser.add_argument_group("with your data")
    data.add_argument("--data", type=Path, metavar="FILE.jsonl", help="questions, one a line")
    data.add_argument("--metric", choices=tuple(metrics()), help="of the lines that name none")
    data.add_argument("--suffix", help="follows every question, instead of the metric's own")
    data.add_argument("--max-new-tokens", type=int, help="default: the metric's own")
    data.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    data.add_argument(
        "-o",
        "--output",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="answers, one a line; a run begun there goes on (default: DATA-BUNDLE.answers.jsonl)",
    )
    table = parser.add_argument_group("for the table of tiny_ocr")
    table.add_argument("--images", type=int, default=2000, help="held-out pictures")
    table.add_argument("--only", action="append", default=[], help="one row of the table")
    table.add_argument("--peers", action="store_true", help="rows of llama.cpp too, if installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    add_device(parser)
    parser.set_defaults(trailing="bundles")


def run(arguments: argparse.Namespace) -> int:
    """Ask, score, print, and write the result; returns the exit status.

    Raises:
        UsageError: options that do not go together.
        DataError: the data or the answers of an earlier run cannot be used.
    """
    if bool(arguments.bundles) != (arguments.data is not None):
        raise UsageError(
            "BUNDLE and --data belong together: give both for your data, neither for the table of"
            " tiny_ocr"
        )
    if arguments.data is None:
        _refuse_data_options(arguments)
        return run_accuracy(
            images=arguments.images,
            only=arguments.only,
            peers=arguments.peers,
            threads=arguments.threads,
            output=arguments.json,
        )
    return run_evaluation(
        [Path(bundle) for bundle in arguments.bundles],
        arguments.data,
        metric=arguments.metric,
        options=filled(RunOptions, arguments),
        engine=filled(Engine, arguments),
        outputs=arguments.output,
        report=arguments.json,
    )


def _refuse_data_options(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options that the table, with its own questions, would ignore."""
    for name in ("metric", "suffix", "max_new_tokens", "max_tiles", "limit", "output"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is for your data; add BUNDLE and --data")
    if arguments.device not in ("auto", "cpu"):
        raise UsageError("the table of tiny_ocr is made on the CPU; --device is for your data")
