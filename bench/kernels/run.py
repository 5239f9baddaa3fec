"""The `bench kernels` command: on the CPU beside Pillow and NumPy, on CUDA beside the CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_edge.bench.kernels.cpu import run_kernels
from internvl_edge.bench.kernels.cuda import run_cuda_kernels
from internvl_edge.bundle.errors import DeviceError
from internvl_edge.kernels.build import BuildError
from internvl_edge.runtime.options import add_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_threads(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", type=Path, metavar="DIR", help="of cuda: write the report there")


def run(arguments: argparse.Namespace) -> int:
    """Check and time every kernel; returns the exit status: 1 where one is wrong.

    Raises:
        DeviceError: no device, driver, bindings or compiler.
        OutputError: the report cannot be written.
    """
    if arguments.device == "cpu":
        return run_kernels(threads=arguments.threads, as_json=arguments.json)
    try:
        return run_cuda_kernels(as_json=arguments.json, store=arguments.store)
    except BuildError as error:
        raise DeviceError(str(error)) from error
