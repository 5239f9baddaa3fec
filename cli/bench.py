"""The `bench` commands; `bench` itself is imported when one of them is typed."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.accuracy import add_accuracy
from internvl_edge.cli.common import (
    Commands,
    add_threads,
    check_threads,
)
from internvl_edge.cli.peers import add_peers
from internvl_edge.cli.speed import add_speed


def add_bench(commands: Commands) -> None:
    """Add `bench` and its subjects to the command line."""
    bench = commands.add_parser("bench", help="measure beside a reference, correctness first")
    subjects = bench.add_subparsers(required=True, metavar="SUBJECT")
    kernels = subjects.add_parser("kernels", help="tiling and pixel shuffle against Pillow, NumPy")
    kernels.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_threads(kernels)
    kernels.add_argument("--json", action="store_true")
    kernels.add_argument(
        "--store", type=Path, metavar="DIR", help="of cuda: write the report there"
    )
    kernels.set_defaults(run=_kernels)
    precision = subjects.add_parser("precision", help="integers against float, at true width")
    add_threads(precision)
    precision.add_argument("--json", action="store_true")
    precision.set_defaults(run=_precision)
    engines = subjects.add_parser("engines", help="what building TensorRT engines takes, no GPU")
    engines.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    engines.set_defaults(run=_engines)
    add_accuracy(subjects)
    add_speed(subjects)
    add_peers(subjects)


def _kernels(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    if arguments.device == "cuda":
        from internvl_edge.bench.kernels.cuda import run_cuda_kernels
        from internvl_edge.kernels.build import BuildError

        try:
            return run_cuda_kernels(as_json=arguments.json, store=arguments.store)
        except BuildError as error:
            raise DeviceError(str(error)) from error
    from internvl_edge.bench.kernels.cpu import run_kernels

    return run_kernels(threads=arguments.threads, as_json=arguments.json)


def _precision(arguments: argparse.Namespace) -> int:
    with extra_installed():
        from internvl_edge.bench.answers.precision import run_precision

    check_threads(arguments.threads)
    return run_precision(threads=arguments.threads, as_json=arguments.json)


def _engines(arguments: argparse.Namespace) -> int:
    with extra_installed():
        from internvl_edge.bench.gpu.engines import run_engines

    return run_engines(output=arguments.json)
