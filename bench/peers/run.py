"""The `bench peers` command: same weights, prompt and threads; this runtime and a peer in turns.

    internvl-edge bench peers [CHECKPOINT] [--layers N] [--language int4] [--block N] [--head int4]
                              [--peer NAME ...] [--threads N] [--prompt N] [--new-tokens N]
                              [--repeat N] [--json FILE]

Without a checkpoint: InternVL 1.5's true shapes cut to a few layers, with drawn weights. Every
system runs in a process of its own and waits asleep for its turn. Ratios are taken turn by turn,
and their median is printed: another process that slows the machine slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

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
from internvl_edge.bundle.errors import DeviceError, LimitError
from internvl_edge.calib_data.generator import generate
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, ModelSource
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.ops import available_cores

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

    def check(self) -> None:
        """Raise LimitError for a number that makes no sense."""
        for option in ("prompt", "new_tokens", "runs"):
            if (value := getattr(self, option)) < 1:
                name = "repeat" if option == "runs" else option.replace("_", "-")
                raise LimitError(f"--{name} is {value}, it must be at least 1")


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


def run_peers(
    checkpoint: Path | None,
    *,
    layers: int | None,
    language: LanguagePrecision,
    block: int,
    head_bits: Literal[4, 8],
    names: Sequence[str],
    settings: Settings,
    optimum_python: Path | None,
    work: Path | None,
    json_file: Path | None,
) -> int:
    """Measure and print; returns the exit status.

    Args:
        block: inputs that share a scale where the decoder is stored as integers.
        head_bits: of the output head there.
        layers: of the drawn model; None is `SYNTHETIC_LAYERS`.
        work: folder for the converted weights while they are needed; None is the system's.

    Raises:
        LimitError: a number or a name that makes no sense, or an output that cannot be written.
    """
    settings.check()
    # Rounded to nearest: how integers were chosen does not change the time.
    options = QuantOptions(block=block, head_bits=head_bits, naive=True)
    peers = choose_peers(names)
    check_writable(json_file)
    if work is not None and not work.is_dir():
        raise LimitError(f"--work {work} is not a directory; make it first")
    source = _source(checkpoint, layers)
    longest = source.spec.language.max_position_embeddings
    if settings.context > longest:
        raise LimitError(f"{settings.context} tokens are beyond the {longest} of this model")
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
                python = interpreter(peer, optimum_python)
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
    if json_file is not None:
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
        write_result(result, json_file)
    return 0


def default_threads(threads: int | None) -> int:
    return threads or available_cores()


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
            raise LimitError("--layers is for the drawn model; a checkpoint is measured whole")
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
