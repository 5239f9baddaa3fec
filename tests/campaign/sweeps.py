"""A turn interrupted at each of its moments, one after the other: what chance may miss.

    cd tests && python -m campaign.sweeps --every 7

After each, the chat, and another one, answer as a fresh model does with the history that is told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from campaign.interrupts import GOLDEN, REUSE, SYSTEMS, Campaign, Moments, Totals, Turn, picture
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL

#: Chats on one model: what it holds grows with each interrupt.
CHATS = 60


@dataclass(frozen=True)
class Scene:
    """What is said before a turn that is interrupted, and in it.

    Attributes:
        system: message.
        reuse: bytes kept between answers.
        before: a turn, of another chat where that is kept.
        turn: which is interrupted.
    """

    system: str
    reuse: int
    before: Turn
    turn: Turn


#: A picture of more tiles after one of one; a beginning that is copied; positions beyond the
#: trained ones.
SCENES = (
    Scene(SYSTEMS[0], REUSE[0], Turn("Number 0, who?", [], 3), Turn("Number 1?", [picture(0)], 3)),
    Scene(
        SYSTEMS[1],
        REUSE[-1],
        Turn("Number 0, who?", [picture(0)], 3),
        Turn("Number 1?", [picture(0), picture(1)], 3),
    ),
    Scene(
        SYSTEMS[2],
        REUSE[0],
        Turn("Number 0, who?", [picture(0)], 2),
        Turn("Number 1?", [picture(1)], 4),
    ),
)
AFTER = Turn("Number 2, where?", [picture(2)], 3)


def interrupt() -> None:
    raise KeyboardInterrupt


class Sweep(Campaign):
    """Interrupts the turn of a scene at one moment after the other.

    Args:
        model: whose turn is interrupted.
        fresh: keeps nothing between answers.
        scene: what is said.
    """

    def __init__(self, model: InternVL, fresh: InternVL, scene: Scene) -> None:
        super().__init__(model, fresh, 0)
        self._scene = scene
        self.turns |= {turn.text: turn for turn in (scene.before, scene.turn, AFTER)}

    def at(self, moment: int) -> bool:
        """Interrupt the turn at a moment; whether it has so many."""
        scene, when = self._scene, f"interrupt at {moment}"
        chat, other = (self._model.chat(system_message=scene.system, max_tiles=2) for _ in range(2))
        said = other if scene.reuse else chat
        said.send(scene.before.text, scene.before.images, max_new_tokens=scene.before.tokens)
        counted = Moments(moment, interrupt)
        with suppress(KeyboardInterrupt), counted:
            self._ask(chat, scene.turn).finish()
        self.compare(chat, AFTER, scene.system, 2, when)
        self.compare(other, scene.turn, scene.system, 2, when)
        return counted.seen >= moment


def run(load: Callable[[int], InternVL], every: int, start: int = 1) -> Totals:
    """Interrupt the turn of each scene at every so many moments.

    Args:
        load: a model that keeps so many bytes between answers.
    """
    totals, fresh = Totals(), load(0)
    for scene in SCENES:
        moment, more = start, True
        while more:
            sweep = Sweep(load(scene.reuse), fresh, scene)
            for _ in range(CHATS):
                more = more and sweep.at(moment)
                moment += every
            totals.add(sweep.totals)
    return totals


def main() -> int:
    """Command line; returns 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--start", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(GOLDEN, Path(folder) / "bundle")

        def load(reuse: int) -> InternVL:
            return InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=reuse)

        totals = run(load, arguments.every, arguments.start)
    for fault in totals.faults:
        print(fault)
    print(totals)
    return 1 if totals.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
