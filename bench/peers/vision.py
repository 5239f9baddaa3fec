"""The `bench peers vision` command: the tower and projector here and in a peer, in turns.

    internvl-edge bench peers vision [--model NAME] [--layers N] [--precision int8] [--tiles N ...]
                                     [--peer NAME ...] [--threads N] [--repeat N] [--json FILE]

A published model's true shapes cut to a few layers, with drawn weights; see `run`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from internvl_edge.bench.common.stored import check_writable
from internvl_edge.bench.peers.comparison import (
    MODEL,
    Comparison,
    Standing,
    add_options,
    write_bundle,
)
from internvl_edge.bench.peers.mtmd import write_mtmd
from internvl_edge.bench.peers.rounds import PAUSE
from internvl_edge.bench.peers.systems import TOWER_PEERS, Peer, choose_peers, obstacle
from internvl_edge.bench.peers.table import VISION_FORMAT
from internvl_edge.bench.peers.towers import write_tower
from internvl_edge.bench.peers.worker import Worker, versions
from internvl_edge.bench.scale.run import synthetic_spec
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import VisionPrecision
from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.checkpoint.names import is_language, tensor_shapes
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime.options import at_least

OWN = "internvl-edge tower"
LAYERS = 2
#: How integers were chosen does not change the time.
NEAREST = QuantOptions(naive=True)


@dataclass(frozen=True)
class VisionStanding(Standing):
    """Seconds a tile of a peer and of this runtime, by the number of tiles: medians, and the
    median of the ratios of turns, which is the peer's seconds over this runtime's."""

    peer_s: dict[int, float]
    own_s: dict[int, float]
    ratio: dict[int, float]

    @property
    def lines(self) -> Iterator[str]:
        """Milliseconds a tile."""
        for count, ratio in self.ratio.items():
            peer, own = 1e3 * self.peer_s[count], 1e3 * self.own_s[count]
            yield f"  {count:3} tiles {peer:9.1f}, here {own:9.1f}: {ratio:5.2f}x"


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

    def title(self) -> str:
        """Return what is measured in words."""
        return (
            f"{self.model}, {self.layers} layers of the tower and the projector, {self.precision};"
            f" {self.runs} rounds in turns; milliseconds a tile, medians"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_options(parser, LAYERS)
    parser.add_argument("--precision", choices=get_args(VisionPrecision), default="int8")
    parser.add_argument("--tiles", type=at_least(1, "--tiles"), nargs="+", default=[1], metavar="N")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: a number or a name that makes no sense.
        OutputError: an output that cannot be written.
    """
    check_writable(arguments.json)
    peers = choose_peers(arguments.peer, TOWER_PEERS)
    task = VisionTask(
        arguments.model or MODEL,
        LAYERS if arguments.layers is None else arguments.layers,
        arguments.precision,
        arguments.threads or available_cores(),
        tuple(dict.fromkeys(arguments.tiles)),
        arguments.repeat,
    )
    source = task.source()
    comparison = Comparison(VISION_FORMAT, asdict(task), task.title(), task.threads)
    with scratch_folder() as folder:
        bundle = write_bundle(source, folder, Recipe(task.precision, "fp32", "fp32", NEAREST))
        own = Worker(OWN, bundle, [task.threads])

        def measure(peer: Peer) -> VisionStanding:
            return _measure(own, peer, task, source, folder)

        comparison.run(own, peers, measure, arguments.json)
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
    side = source.spec.vision.tile_size
    with closing(Worker(peer.engine, _file(peer, source, folder), [task.threads])) as worker:
        found = {count: _in_turns(own, worker, count, side, task.runs) for count in task.tiles}
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
        write_bundle(source, path, Recipe(precision, "fp16", "fp16", NEAREST, "tensorrt"))
    return path / "bundle"
