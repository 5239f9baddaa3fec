"""The `bench peers` command."""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.common import (
    Commands,
    add_threads,
    check_threads,
)


def add_peers(subjects: Commands) -> None:
    """Add the command to those of `bench`."""
    peers = subjects.add_parser(
        "peers",
        help="llama.cpp, transformers and Optimum on the same weights, in turns",
        description="The language part in this runtime and in each peer that is installed: the same"
        " weights, prompt and threads, one turn each.",
    )
    peers.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="default: InternVL 1.5's true shapes with drawn weights",
    )
    peers.add_argument("--layers", type=int, metavar="N", help="of the drawn model (default: 8)")
    peers.add_argument("--language", choices=("fp32", "fp16", "int8", "int4"), default="int4")
    peers.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    peers.add_argument("--head", choices=("int8", "int4"), default="int8")
    peers.add_argument(
        "--peer", action="append", default=[], metavar="NAME", help="its name's beginning; repeat"
    )
    peers.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens prefilled")
    peers.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens decoded")
    peers.add_argument("--repeat", type=int, default=5, help="measured rounds of each pair")
    peers.add_argument(
        "--optimum-python", type=Path, metavar="FILE", help="interpreter that has optimum-onnx"
    )
    peers.add_argument("--work", type=Path, metavar="DIR", help="where weights lie meanwhile")
    add_threads(peers)
    peers.add_argument("--json", type=Path, metavar="FILE", help="store every round there")
    peers.set_defaults(run=_peers)


def _peers(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    with extra_installed():
        from internvl_edge.bench.peers.run import Settings, default_threads, run_peers

    return run_peers(
        arguments.checkpoint,
        layers=arguments.layers,
        language=arguments.language,
        block=arguments.block,
        head_bits=4 if arguments.head == "int4" else 8,
        names=arguments.peer,
        settings=Settings(
            threads=default_threads(arguments.threads),
            prompt=arguments.prompt,
            new_tokens=arguments.new_tokens,
            runs=arguments.repeat,
        ),
        optimum_python=arguments.optimum_python,
        work=arguments.work,
        json_file=arguments.json,
    )
