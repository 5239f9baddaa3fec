"""The `bench` commands about answers: accuracy, fidelity, convert."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_edge.bundle.errors import LimitError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.common import Commands, add_device, check_threads

#: `bench.metrics.metrics` and `bench.converters.layouts` by name, without importing `bench`.
METRICS = ("anls", "relaxed", "vqa", "exact", "ocrbench", "ocrbench-formula", "mc")
DATASETS = ("docvqa", "infovqa", "chartqa", "textvqa", "ocrbench", "ai2d", "mmmu", "mathvista")


def add_accuracy(subjects: Commands) -> None:
    """Add the commands to those of `bench`."""
    _add_accuracy(subjects)
    _add_fidelity(subjects)
    _add_convert(subjects)


def _add_accuracy(subjects: Commands) -> None:
    accuracy = subjects.add_parser(
        "accuracy",
        help="answers to your questions, scored as the datasets do; or tiny_ocr's table",
        description="With BUNDLE and --data: score one bundle, or two beside each other. Without:"
        " exact match of the tiny_ocr example at every precision.",
    )
    accuracy.add_argument("bundles", nargs="*", metavar="BUNDLE")
    data = accuracy.add_argument_group("with your data")
    data.add_argument("--data", type=Path, metavar="FILE.jsonl", help="questions, one a line")
    data.add_argument("--metric", choices=METRICS, help="of the lines that name none")
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
    table = accuracy.add_argument_group("for the table of tiny_ocr")
    table.add_argument("--images", type=int, default=2000, help="held-out pictures")
    table.add_argument("--only", action="append", default=[], help="one row of the table")
    table.add_argument("--peers", action="store_true", help="rows of llama.cpp too, if installed")
    accuracy.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    add_device(accuracy)
    accuracy.set_defaults(run=_accuracy, trailing="bundles")


def _add_fidelity(subjects: Commands) -> None:
    fidelity = subjects.add_parser(
        "fidelity", help="KL divergence, agreement and perplexity against the float bundle"
    )
    fidelity.add_argument("bundle", type=Path, metavar="BUNDLE")
    fidelity.add_argument(
        "--reference", type=Path, required=True, metavar="FLOAT_BUNDLE", help="its float parent"
    )
    fidelity.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="questions (default: tiny_ocr pictures)"
    )
    fidelity.add_argument("--images", type=int, default=50, help="tiny_ocr pictures")
    fidelity.add_argument(
        "--answers",
        choices=("greedy", "given"),
        default="greedy",
        help="read along the reference's own answers, or the data's",
    )
    fidelity.add_argument("--suffix", help="follows every question, instead of the metric's own")
    fidelity.add_argument("--max-new-tokens", type=int, default=100, help="of a greedy answer")
    fidelity.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    fidelity.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    add_device(fidelity)
    fidelity.set_defaults(run=_fidelity)


def _add_convert(subjects: Commands) -> None:
    convert = subjects.add_parser("convert", help="a dataset's official layout to FILE.jsonl")
    convert.add_argument("kind", choices=DATASETS)
    convert.add_argument("source", type=Path, metavar="SOURCE", help="file or folder, as released")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    convert.add_argument("--images", type=Path, metavar="DIR", help="where its images are instead")
    convert.set_defaults(run=_convert)


def _accuracy(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    if bool(arguments.bundles) != (arguments.data is not None):
        raise LimitError(
            "BUNDLE and --data belong together: give both for your data, neither for the table of"
            " tiny_ocr"
        )
    if arguments.data is None:
        _refuse_data_options(arguments)
    with extra_installed():
        from internvl_edge.bench.answers.accuracy import run_accuracy
        from internvl_edge.bench.answers.evaluation import Engine, RunOptions, run_evaluation

    if arguments.data is None:
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
        options=RunOptions(
            arguments.suffix, arguments.max_new_tokens, arguments.max_tiles, arguments.limit
        ),
        engine=Engine(arguments.device, arguments.threads),
        outputs=arguments.output,
        report=arguments.json,
    )


def _refuse_data_options(arguments: argparse.Namespace) -> None:
    """The table has its own questions and runs on the CPU: such options would be ignored."""
    for name in ("metric", "suffix", "max_new_tokens", "max_tiles", "limit", "output"):
        if getattr(arguments, name):
            raise LimitError(f"--{name.replace('_', '-')} is for your data; add BUNDLE and --data")
    if arguments.device not in ("auto", "cpu"):
        raise LimitError("the table of tiny_ocr is made on the CPU; --device is for your data")


def _fidelity(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    with extra_installed():
        from internvl_edge.bench.answers.evaluation import Engine
        from internvl_edge.bench.answers.fidelity import run_fidelity

    return run_fidelity(
        arguments.bundle,
        arguments.reference,
        data=arguments.data,
        images=arguments.images,
        answers=arguments.answers,
        suffix=arguments.suffix,
        max_new_tokens=arguments.max_new_tokens,
        max_tiles=arguments.max_tiles,
        engine=Engine(arguments.device, arguments.threads),
        report=arguments.json,
    )


def _convert(arguments: argparse.Namespace) -> int:
    with extra_installed():
        from internvl_edge.bench.peers.converters import convert

    count = convert(arguments.kind, arguments.source, arguments.output, arguments.images)
    print(f"wrote {count} questions to {arguments.output}")
    return 0
