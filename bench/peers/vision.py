"""The `bench peers vision` command: the tower and projector here and in a peer, in turns.

    internvl-edge bench peers vision [--model NAME] [--layers N] [--precision int8] [--tiles N ...]
                                     [--peer NAME ...] [--threads N] [--repeat N] [--json FILE]

A published model's true shapes cut to a few layers, with drawn weights; see `run`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

from internvl_edge.bench.common.machine import busy_note, describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.peers.mtmd import write_mtmd
from internvl_edge.bench.peers.rounds import PAUSE
from internvl_edge.bench.peers.systems import Peer, choose_peers, obstacle
from internvl_edge.bench.peers.table import VERSION, VISION_FORMAT
from internvl_edge.bench.peers.towers import write_tower
from internvl_edge.bench.peers.worker import Worker, versions
from internvl_edge.bench.scale.run import synthetic_spec, write_pictures
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import DialectName, VisionPrecision
from internvl_edge.bundle.errors import DeviceError, LimitError
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.checkpoint.names import is_language, tensor_shapes
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime.options import add_threads, at_least

OWN = "internvl-edge tower"
MODEL, LAYERS = "internvl-chat-v1-5", 2
_OPENVINO = "pip install 'internvl-edge[peers-openvino]'"
_COMPILE = "compile_model(CPU, LATENCY, INFERENCE_NUM_THREADS) of a TensorRT bundle's vision.onnx"
TOWER_PEERS = (
    Peer(
        "OpenVINO INT8",
        "openvino tower",
        ("openvino",),
        _OPENVINO,
        "int8",
        8.0,
        f"{_COMPILE}: INT8 between QuantizeLinear and DequantizeLinear",
    ),
    Peer("OpenVINO", "openvino tower", ("openvino",), _OPENVINO, "fp16", 8.0, _COMPILE),
    Peer(
        "llama.cpp f16",
        "llama.cpp tower",
        ("llama-cpp-python", "gguf"),
        "pip install 'internvl-edge[peers]'",
        "mtmd",
        4.0,
        "mtmd_encode_chunk with n_threads, a tile at a time",
    ),
    Peer(
        "transformers bf16",
        "transformers tower",
        ("torch", "transformers"),
        "pip install 'internvl-edge[train]'",
        "tower",
        6.0,
        "InternVLModel.get_image_features in bfloat16",
    ),
)


@dataclass(frozen=True)
class VisionStanding:
    """Seconds a tile of a peer and of this runtime, by the number of tiles: medians, and the
    median of the ratios of turns, which is the peer's seconds over this runtime's."""

    name: str
    versions: dict[str, str]
    features: str
    call: str
    peer_s: dict[int, float]
    own_s: dict[int, float]
    ratio: dict[int, float]


@dataclass(frozen=True)
class VisionTask:
    """What is measured: whose tower, cut to so many layers, how it is stored, with what."""

    model: str
    layers: int
    precision: VisionPrecision
    threads: int
    tiles: tuple[int, ...]
    runs: int

    def source(self) -> SyntheticWeights:
        """Return the weights; the decoder, which is not measured, is the smallest there is.

        Raises:
            CheckpointError: no such model.
            UsageError: more layers than it has.
        """
        spec = synthetic_spec(self.model, self.layers)
        language = replace(spec.language, num_hidden_layers=1, vocab_size=1024)
        return SyntheticWeights(replace(spec, language=language))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="whose shapes are drawn")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N", help="of the tower")
    parser.add_argument("--precision", choices=get_args(VisionPrecision), default="int8")
    parser.add_argument("--tiles", type=at_least(1, "--tiles"), nargs="+", default=[1], metavar="N")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME", help="its name's beginning; repeat"
    )
    parser.add_argument(
        "--repeat", type=at_least(1, "--repeat"), default=5, metavar="N", help="measured rounds"
    )
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: a number or a name that makes no sense.
        OutputError: an output that cannot be written.
    """
    check_writable(arguments.json)
    peers = choose_peers(arguments.peer, TOWER_PEERS)
    task = VisionTask(
        arguments.model,
        arguments.layers,
        arguments.precision,
        arguments.threads or available_cores(),
        tuple(dict.fromkeys(arguments.tiles)),
        arguments.repeat,
    )
    source = task.source()
    machine = {**describe_machine(task.threads), "cpu_features": cpu_features()}
    note = busy_note(machine)
    standings: list[VisionStanding] = []
    skipped: dict[str, str] = {}
    with scratch_folder() as folder:
        bundle = _export(source, folder, "onnxruntime", task.precision)
        own = Worker(OWN, bundle, [task.threads])
        try:
            print(_head(task, machine), flush=True)
            for peer in peers:
                try:
                    standing = _measure(own, peer, task, source, folder)
                except (DeviceError, LimitError) as error:
                    skipped[peer.name] = str(error)
                    print(f"{peer.name:20} not measured: {error}", flush=True)
                else:
                    standings.append(standing)
                    print(_lines(standing), flush=True)
        finally:
            own.close()
    if note is not None:
        print(f"note: {note}")
    if arguments.json is not None:
        result = {
            "format": VISION_FORMAT,
            "version": VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **asdict(task),
            "machine": machine,
            "notes": [note] if note else [],
            "features": own.features,
            "peers": [asdict(standing) for standing in standings],
            "not_measured": skipped,
        }
        write_result(result, arguments.json)
    return 0


def _measure(
    own: Worker, peer: Peer, task: VisionTask, source: SyntheticWeights, folder: Path
) -> VisionStanding:
    """Rounds of both in turns.

    Raises:
        DeviceError: the peer is not installed, has no room, or does not run.
        LimitError: it does not know such a tower.
    """
    installed = versions(peer.packages)
    if reason := obstacle(peer, tower_parameters(source.spec), installed):
        raise DeviceError(reason)
    worker = Worker(peer.engine, _file(peer, source, folder), [task.threads])
    side = source.spec.vision.tile_size
    try:
        found = {count: _in_turns(own, worker, count, side, task.runs) for count in task.tiles}
    finally:
        worker.close()
    return VisionStanding(
        name=peer.name,
        versions=installed,
        features=worker.features,
        call=peer.call,
        peer_s={count: statistics.median(theirs) for count, (_, theirs) in found.items()},
        own_s={count: statistics.median(mine) for count, (mine, _) in found.items()},
        ratio={count: median_ratio(theirs, mine) for count, (mine, theirs) in found.items()},
    )


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of ratios taken turn by turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _in_turns(
    own: Worker, peer: Worker, tiles: int, side: int, runs: int
) -> tuple[list[float], list[float]]:
    """Seconds a tile of both, a round of each after the other."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for system, seconds in zip((own, peer), taken, strict=True):
            found = system.encode(tiles, side) / tiles
            if number:  # the first is warm-up
                seconds.append(found)
            time.sleep(PAUSE)
    return taken


def tower_parameters(spec: ModelSpec) -> int:
    """Parameters of the tower and its projector."""
    shapes = tensor_shapes(spec).items()
    return sum(math.prod(shape) for name, shape in shapes if not is_language(name))


def _file(peer: Peer, source: SyntheticWeights, folder: Path) -> Path:
    """Return what a peer reads; written when it is first asked for."""
    path = folder / peer.form
    writers = {"tower": write_tower, "mtmd": write_mtmd}
    if (write := writers.get(peer.form)) is not None:
        return path if path.exists() else write(source, path)
    if not path.exists():
        precision: VisionPrecision = "int8" if peer.form == "int8" else "fp16"
        _export(source, path, "tensorrt", precision)
    return path / "bundle"


def _export(
    source: SyntheticWeights, folder: Path, dialect: DialectName, precision: VisionPrecision
) -> Path:
    print("converting the weights", file=sys.stderr)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    return export_bundle(
        source,
        folder / "bundle",
        vision=precision,
        language="fp32" if dialect == "onnxruntime" else "fp16",
        dialect=dialect,
        # Rounded to nearest: how integers were chosen does not change the time.
        options=QuantOptions(naive=True),
        calibration=write_pictures(pictures, source.spec.vision.tile_size, 1),
        sensitivity=False,
    )


def _head(task: VisionTask, machine: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    return (
        f"{machine['cpu']}, {task.threads} threads, {' '.join(machine['cpu_features'])};"
        f" {libraries}\n"
        f"{task.model}, {task.layers} layers of the tower and the projector, {task.precision};"
        f" {task.runs} rounds in turns; milliseconds a tile, medians"
    )


def _lines(standing: VisionStanding) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in standing.versions.items())
    lines = [f"{standing.name} ({packages}; {standing.features})"]
    for count, ratio in standing.ratio.items():
        peer, own = 1e3 * standing.peer_s[count], 1e3 * standing.own_s[count]
        lines.append(f"  {count:3} tiles {peer:9.1f}, here {own:9.1f}: {ratio:5.2f}x")
    return "\n".join(lines)
