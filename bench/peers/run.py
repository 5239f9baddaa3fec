"""The `bench peers` command: same weights, prompt and threads; this runtime and a peer in turns.

    internvl-edge bench peers [CHECKPOINT] [--layers N] [--language int4] [--block N] [--head int4]
                              [--peer NAME ...] [--threads N] [--prompt N] [--new-tokens N]
                              [--repeat N] [--json FILE]

Without a checkpoint: InternVL 1.5's true shapes cut to a few layers, with drawn weights. Every
system runs in a process of its own and waits asleep for its turn. Ratios are taken turn by turn,
and their median is printed: another process that slows the machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import numpy as np

from internvl_edge.bench.common.machine import busy_note, describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.peers.systems import (
    Files,
    Peer,
    choose_peers,
    interpreter,
    obstacle,
)
from internvl_edge.bench.peers.worker import Round, Worker, versions
from internvl_edge.bench.scale.run import synthetic_spec
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import LanguagePrecision
from internvl_edge.bundle.errors import DeviceError, UsageError
from internvl_edge.calib_data.generator import generate
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, ModelSource
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime.options import add_threads, at_least

OWN = "internvl-edge"
SYNTHETIC = "internvl-chat-v1-5"
SYNTHETIC_LAYERS = 8
#: Seconds between turns, for the threads of the last one to stop spinning.
PAUSE = 0.1


@dataclass(frozen=True)
class Settings:
    """What every system is given.

    Attributes:
        prompt: tokens prefilled.
        new_tokens: tokens decoded after them.
        runs: measured rounds, after one of warm-up.
    """

    threads: int
    prompt: int
    new_tokens: int
    runs: int

    @property
    def context(self) -> int:
        return self.prompt + self.new_tokens


@dataclass(frozen=True)
class Standing:
    """Rates in tokens a second, medians; ratios are this runtime's rate over the peer's."""

    name: str
    versions: dict[str, str]
    prefill: float
    decode: float
    own_prefill: float
    own_decode: float
    prefill_ratio: float
    decode_ratio: float
    own_rounds: list[Round]
    rounds: list[Round]


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
        help="default: InternVL 1.5's true shapes with drawn weights",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help=f"of the drawn model (default: {SYNTHETIC_LAYERS})"
    )
    parser.add_argument("--language", choices=get_args(LanguagePrecision), default="int4")
    parser.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--head", choices=("int8", "int4"), default="int8")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME", help="its name's beginning; repeat"
    )
    for option, default, told in (
        ("--prompt", 256, "tokens prefilled"),
        ("--new-tokens", 16, "tokens decoded"),
        ("--repeat", 5, "measured rounds of each pair"),
    ):
        parser.add_argument(
            option, type=at_least(1, option), default=default, metavar="N", help=told
        )
    parser.add_argument(
        "--optimum-python", type=Path, metavar="FILE", help="interpreter that has optimum-onnx"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where weights lie meanwhile")
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every round there")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: a number or a name that makes no sense, or an output that cannot be written.
    """
    checkpoint, language, work = arguments.checkpoint, arguments.language, arguments.work
    settings = Settings(
        threads=arguments.threads or available_cores(),
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        runs=arguments.repeat,
    )
    # Rounded to nearest: how integers were chosen does not change the time.
    options = QuantOptions(
        block=arguments.block, head_bits=4 if arguments.head == "int4" else 8, naive=True
    )
    peers = choose_peers(arguments.peer)
    check_writable(arguments.json)
    if work is not None and not work.is_dir():
        raise UsageError(f"--work {work} is not a directory; make it first")
    source = _source(checkpoint, arguments.layers)
    longest = source.spec.language.max_position_embeddings
    if settings.context > longest:
        raise UsageError(f"{settings.context} tokens are beyond the {longest} of this model")
    machine = describe_machine(settings.threads)
    note = busy_note(machine)
    standings: list[Standing] = []
    skipped: dict[str, str] = {}
    with scratch_folder(work) as folder:
        bundle = _export(source, folder, language, options)
        files = Files(source, folder, settings.threads)
        own = Worker(OWN, bundle, settings.threads, settings.context)
        try:
            print(_head(settings, machine, language), flush=True)
            for peer in peers:
                python = interpreter(peer, arguments.optimum_python)
                try:
                    installed = versions(peer.packages, python)
                    if reason := obstacle(peer, source.spec, installed):
                        raise DeviceError(reason)
                    standing = _measure(own, peer, files, installed, settings, python)
                except DeviceError as error:
                    skipped[peer.name] = str(error)
                    print(f"{peer.name:28} not measured: {error}", flush=True)
                else:
                    standings.append(standing)
                    print(_line(standing), flush=True)
        finally:
            own.close()
    if note is not None:
        print(f"note: {note}")
    if arguments.json is not None:
        result = {
            "format": "internvl-edge peers",
            "version": 1,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": SYNTHETIC if checkpoint is None else checkpoint.name,
            "layers": source.spec.language.num_hidden_layers,
            "language": language,
            "block": options.block,
            "head_bits": options.head_bits,
            "machine": machine,
            "notes": [note] if note else [],
            "settings": asdict(settings),
            "peers": [asdict(standing) for standing in standings],
            "not_measured": skipped,
        }
        write_result(result, arguments.json)
    return 0


def compare(name: str, installed: dict[str, str], own: list[Round], peer: list[Round]) -> Standing:
    """Two systems' rounds, taken in turns with the same prompt."""
    prompt = own[0].prompt
    own_prefill, prefill = ([prompt / r.prefill_s for r in rounds] for rounds in (own, peer))
    own_decode, decode = (
        [1 / statistics.median(r.decode_s) for r in rounds] for rounds in (own, peer)
    )
    return Standing(
        name=name,
        versions=installed,
        prefill=statistics.median(prefill),
        decode=statistics.median(decode),
        own_prefill=statistics.median(own_prefill),
        own_decode=statistics.median(own_decode),
        prefill_ratio=_median_ratio(own_prefill, prefill),
        decode_ratio=_median_ratio(own_decode, decode),
        own_rounds=own,
        rounds=peer,
    )


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _measure(
    own: Worker,
    peer: Peer,
    files: Files,
    installed: dict[str, str],
    settings: Settings,
    python: str,
) -> Standing:
    """Rounds of both in turns.

    Raises:
        DeviceError: the peer does not run.
    """
    path = files.path(peer)
    worker = Worker(peer.engine, path, settings.threads, settings.context, python)
    prompt = _prompt(settings.prompt)
    rounds: tuple[list[Round], list[Round]] = ([], [])
    try:
        for number in range(settings.runs + 1):
            for system, taken in zip((own, worker), rounds, strict=True):
                result = system.round(prompt, settings.new_tokens)
                if number:  # the first is warm-up
                    taken.append(result)
                time.sleep(PAUSE)
    finally:
        worker.close()
    return compare(peer.name, installed, *rounds)


def _prompt(tokens: int) -> list[int]:
    """Ids that every vocabulary of the family has, none of them special."""
    return [int(token) for token in np.random.default_rng(0).integers(3, 450, tokens)]


def _source(checkpoint: Path | None, layers: int | None) -> ModelSource:
    if checkpoint is not None:
        if layers is not None:
            raise UsageError("--layers is for the drawn model; a checkpoint is measured whole")
        return Checkpoint(checkpoint)
    spec = synthetic_spec(SYNTHETIC, SYNTHETIC_LAYERS if layers is None else layers)
    # The vision tower is not measured: the smallest there is.
    return SyntheticWeights(replace(spec, vision=replace(spec.vision, num_hidden_layers=1)))


def _export(
    source: ModelSource, folder: Path, language: LanguagePrecision, options: QuantOptions
) -> Path:
    print("converting the weights", file=sys.stderr)
    side = source.spec.vision.tile_size
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, item in enumerate(generate(1, seed=1)):
        item.image.resize((side, side)).save(pictures / f"{number}.png")
    return export_bundle(
        source,
        folder / "bundle",
        language=language,
        options=options,
        calibration=pictures,
        sensitivity=False,
    )


def _head(settings: Settings, machine: dict[str, Any], language: str) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    return (
        f"{machine['cpu']}, {settings.threads} threads; {libraries}\n"
        f"prefill of {settings.prompt} tokens, {settings.new_tokens} decoded after them,"
        f" {settings.runs} rounds in turns; language {language}; tokens a second, medians\n"
        f"{'':28} {'prefill':>9} {'here':>9} {'ratio':>6}  {'decode':>8} {'here':>8} {'ratio':>6}"
    )


def _line(standing: Standing) -> str:
    s = standing
    packages = ", ".join(f"{name} {version}" for name, version in s.versions.items())
    return (
        f"{s.name:28} {s.prefill:9.1f} {s.own_prefill:9.1f} {s.prefill_ratio:5.2f}x"
        f"  {s.decode:8.2f} {s.own_decode:8.2f} {s.decode_ratio:5.2f}x  {packages}"
    )
