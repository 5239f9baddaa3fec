"""The `bench peers` command: same weights, prompt and threads; this runtime and a peer in turns.

    internvl-edge bench peers [CHECKPOINT] [--model NAME] [--layers N] [--language int4] [--kv int8]
                              [--block N] [--head int4] [--peer NAME ...] [--threads N]
                              [--prompt N] [--new-tokens N] [--sequences N ...] [--repeat N]
                              [--json FILE]

Without a checkpoint: a published model's true shapes cut to a few layers, with drawn weights. Every
system runs in a process of its own and waits asleep for its turn.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from internvl_edge.bench.common.stored import check_writable
from internvl_edge.bench.peers.comparison import MODEL, Comparison, add_options, write_bundle
from internvl_edge.bench.peers.openvino_writer import Packing
from internvl_edge.bench.peers.rounds import (
    DecoderStanding,
    Settings,
    decode_rate,
    in_turns,
    prefill_rate,
)
from internvl_edge.bench.peers.systems import (
    Files,
    Peer,
    choose_peers,
    interpreter,
    language_parameters,
    obstacle,
)
from internvl_edge.bench.peers.table import FORMAT
from internvl_edge.bench.peers.worker import Worker, versions
from internvl_edge.bench.scale.run import synthetic_spec
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import CachePrecision, LanguagePrecision, default_cache
from internvl_edge.bundle.errors import DeviceError, UsageError
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, ModelSource
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime.options import at_least

OWN = "internvl-edge"
LAYERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.description = (
        "The language part in this runtime and in each peer that is installed: the same weights,"
        "\nprompt and threads, one turn each."
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="default: a published model's true shapes with drawn weights",
    )
    add_options(parser, LAYERS)
    parser.add_argument("--language", choices=get_args(LanguagePrecision), default="int4")
    parser.add_argument("--kv", choices=get_args(CachePrecision), help="default: as computed")
    parser.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--head", choices=("int8", "int4"), default="int8")
    for option, default, told in (
        ("--prompt", 256, "tokens prefilled"),
        ("--new-tokens", 16, "tokens decoded, of each sequence"),
    ):
        parser.add_argument(
            option, type=at_least(1, option), default=default, metavar="N", help=told
        )
    parser.add_argument(
        "--sequences",
        type=at_least(1, "--sequences"),
        nargs="+",
        default=[1, 4, 8],
        metavar="N",
        help="how many are decoded together (default: 1 4 8)",
    )
    parser.add_argument(
        "--optimum-python", type=Path, metavar="FILE", help="interpreter that has optimum-onnx"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where weights lie meanwhile")


@dataclass(frozen=True)
class Task:
    """What is measured: a model's language part, how it is exported, what every system is given."""

    name: str
    source: ModelSource
    recipe: Recipe
    settings: Settings

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Task:
        """Return what the options say.

        Raises:
            UsageError: a number or a name that makes no sense.
            CheckpointError: no such model, or not a checkpoint.
        """
        language = arguments.language
        # Rounded to nearest: how integers were chosen does not change the time.
        options = QuantOptions(
            block=arguments.block, head_bits=4 if arguments.head == "int4" else 8, naive=True
        )
        settings = Settings(
            threads=arguments.threads or available_cores(),
            prompt=arguments.prompt,
            new_tokens=arguments.new_tokens,
            sequences=tuple(dict.fromkeys(arguments.sequences)),
            runs=arguments.repeat,
        )
        name, source = _source(arguments.checkpoint, arguments.model, arguments.layers)
        longest = source.spec.language.max_position_embeddings
        if settings.context > longest:
            raise UsageError(f"{settings.context} tokens are beyond the {longest} of this model")
        kv = arguments.kv or default_cache(language)
        return cls(name, source, Recipe("fp32", language, kv, options), settings)

    def described(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "model": self.name,
            "layers": self.source.spec.language.num_hidden_layers,
            "language": self.recipe.language,
            "kv": self.recipe.kv,
            "block": self.recipe.options.block,
            "head_bits": self.recipe.options.head_bits,
            "settings": asdict(self.settings),
        }

    def title(self) -> str:
        """Return the same in words."""
        settings = self.settings
        return (
            f"{self.name}, {self.source.spec.language.num_hidden_layers} layers, language"
            f" {self.recipe.language}: prefill of {settings.prompt} tokens, {settings.new_tokens}"
            f" decoded after them, {settings.runs} rounds in turns; tokens a second, medians"
        )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: a number or a name that makes no sense, or an output that cannot be written.
    """
    peers, work = choose_peers(arguments.peer), arguments.work
    check_writable(arguments.json)
    if work is not None and not work.is_dir():
        raise UsageError(f"--work {work} is not a directory; make it first")
    task = Task.of(arguments)
    settings = task.settings
    comparison = Comparison(FORMAT, task.described(), task.title(), settings.threads)
    with scratch_folder(work) as folder:
        bundle = write_bundle(task.source, folder, task.recipe)
        packing = Packing(head=8 if task.recipe.options.head_bits == 8 else 4)
        files = Files(task.source, folder, settings.threads, packing)
        own = Worker(OWN, bundle, settings.numbers)

        def measure(peer: Peer) -> DecoderStanding:
            python = interpreter(peer, arguments.optimum_python)
            return _measure(own, peer, files, task, python)

        comparison.run(own, peers, measure, arguments.json)
    return 0


def _measure(own: Worker, peer: Peer, files: Files, task: Task, python: str) -> DecoderStanding:
    """Rounds of both in turns.

    Raises:
        DeviceError: the peer is not installed, has no room, or does not run.
    """
    installed = versions(peer.packages, python)
    parameters = language_parameters(task.source.spec)
    if reason := obstacle(peer, parameters, installed):
        raise DeviceError(reason)
    settings = task.settings
    with closing(Worker(peer.engine, files.path(peer), settings.numbers, python)) as worker:
        mine, theirs = in_turns(own, worker, settings)
    return DecoderStanding(
        name=peer.name,
        versions=installed,
        features=worker.features,
        call=peer.call,
        prefill=prefill_rate(mine, theirs),
        decode={count: decode_rate(mine, theirs, count) for count in settings.sequences},
        own_rounds=mine,
        rounds=theirs,
    )


def _source(
    checkpoint: Path | None, model: str | None, layers: int | None
) -> tuple[str, ModelSource]:
    """Return the model's name, and the weights."""
    if checkpoint is not None:
        if model is not None or layers is not None:
            raise UsageError(
                "--model and --layers are for a drawn model; a checkpoint is measured whole"
            )
        return checkpoint.name, Checkpoint(checkpoint)
    name = model or MODEL
    spec = synthetic_spec(name, LAYERS if layers is None else layers)
    # The vision tower is not measured: a small one.
    vision = replace(
        spec.vision,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    return name, SyntheticWeights(replace(spec, vision=vision))
