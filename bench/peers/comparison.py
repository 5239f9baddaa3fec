"""What the commands that compare with peers share: options, turns with each peer, the result."""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from internvl_edge.bench.common.machine import busy_note, describe_machine
from internvl_edge.bench.common.stored import write_result
from internvl_edge.bench.peers.systems import Peer
from internvl_edge.bench.peers.table import VERSION
from internvl_edge.bench.peers.worker import Worker
from internvl_edge.bench.scale.run import write_pictures
from internvl_edge.bundle.errors import DeviceError, LimitError
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.checkpoint.checkpoint import ModelSource
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime.options import add_threads, at_least

#: Whose shapes are drawn.
MODEL = "internvl-chat-v1-5"


def add_options(parser: argparse.ArgumentParser, layers: int) -> None:
    """Declare the options of every comparison.

    Args:
        layers: of the drawn model, where none are told.
    """
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"whose shapes are drawn (default: {MODEL})")
    add("--layers", type=int, metavar="N", help=f"of the drawn model (default: {layers})")
    add("--peer", action="append", default=[], metavar="NAME", help="its name's beginning; repeat")
    rounds = at_least(1, "--repeat")
    add("--repeat", type=rounds, default=5, metavar="N", help="measured rounds of each pair")
    add_threads(parser)
    add("--json", type=Path, metavar="FILE", help="store every round there")


@dataclass(frozen=True)
class Standing(ABC):
    """What turns of a peer and of this runtime say.

    Attributes:
        features: what the peer says it uses of this CPU.
        call: how it was called.
    """

    name: str
    versions: dict[str, str]
    features: str
    call: str

    @property
    @abstractmethod
    def lines(self) -> Iterator[str]:
        """A line for each figure: the peer's, ours, the ratio."""


class Comparison:
    """A comparison on this machine, which is described before anything makes it busy.

    Args:
        form: of the stored result.
        task: what is measured, in plain values.
        title: the same in words.
    """

    def __init__(self, form: str, task: Mapping[str, Any], title: str, threads: int) -> None:
        self._form, self._task = form, task
        self._machine = {**describe_machine(threads), "cpu_features": cpu_features()}
        features, packages = " ".join(cpu_features()), _named(self._machine["libraries"])
        self._head = f"{self._machine['cpu']}, {threads} threads, {features}; {packages}\n{title}"

    def run(
        self,
        own: Worker,
        peers: Sequence[Peer],
        measure: Callable[[Peer], Standing],
        store: Path | None,
    ) -> None:
        """Measure each peer, print its figures, and store those of all.

        Args:
            own: this runtime; it is closed.
            measure: raises DeviceError or LimitError where a peer cannot be measured.
            store: a file; None stores nothing.

        Raises:
            OutputError: it cannot be written.
        """
        standings: list[Standing] = []
        skipped: dict[str, str] = {}
        try:
            print(self._head, flush=True)
            for peer in peers:
                try:
                    standing = measure(peer)
                except (DeviceError, LimitError) as error:
                    skipped[peer.name] = str(error)
                    print(f"{peer.name:28} not measured: {error}", flush=True)
                else:
                    standings.append(standing)
                    print(f"{peer.name} ({_named(standing.versions)}; {standing.features})")
                    print(*standing.lines, sep="\n", flush=True)
        finally:
            own.close()
        notes = [] if (note := busy_note(self._machine)) is None else [note]
        for note in notes:
            print(f"note: {note}")
        if store is None:
            return
        result = {
            "format": self._form,
            "version": VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._task,
            "machine": self._machine,
            "notes": notes,
            "features": own.features,
            "peers": [asdict(standing) for standing in standings],
            "not_measured": skipped,
        }
        write_result(result, store)


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def write_bundle(source: ModelSource, folder: Path, recipe: Recipe) -> Path:
    """Export weights into a folder, which is created where it is not there."""
    print("converting the weights", file=sys.stderr)
    (pictures := folder / "pictures").mkdir(parents=True)
    return export_bundle(
        source,
        folder / "bundle",
        vision=recipe.vision,
        language=recipe.language,
        kv=recipe.kv,
        dialect=recipe.dialect,
        options=recipe.options,
        calibration=write_pictures(pictures, source.spec.vision.tile_size, 1),
        sensitivity=False,
    )
