"""Files damaged at random: what is loaded answers as before, or is refused with an error of ours.

    cd tests && python -m campaign.damage --seconds 600

Every bit of bundle.json is flipped; then a file of a bundle, or of a checkpoint, is damaged in some
way, loaded or exported, and asked. A checkpoint's values have no hash: where a flipped bit makes
it another one, its answers are its own, and only what it does is looked at.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from checkpoints import small_config, write_checkpoint

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.json_reader import JsonError, as_object, parse_json
from internvl_edge.bundle.manifest import Manifest, parse_manifest
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.prepare import prepack
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import InternVL, InternVLEdgeError
from internvl_edge.runtime.inspection import inspect_bundle

#: Seconds after which a try is taken to wait for something.
PATIENCE = 120

PICTURE = np.random.default_rng(0).integers(0, 255, (70, 120, 3), np.uint8)

#: The answer's token ids, and the logits they were chosen from.
Said = tuple[list[int], bytes]
Damage = Callable[[Path, random.Random, list[Path]], None]


@dataclass
class Totals:
    """What came of the tries.

    Attributes:
        tried: all of them.
        refused: with an error of ours.
        right: answered as the undamaged one.
        other: a checkpoint with other values, which nothing vouches for, answered in its own way.
        wrong: answered otherwise, or raised what is not ours.
        faults: descriptions of the wrong ones.
    """

    tried: int = 0
    refused: int = 0
    right: int = 0
    other: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str) -> None:
        self.tried += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome == "wrong":
            self.faults.append(what)

    def __str__(self) -> str:
        other = f", other values {self.other}" if self.other else ""
        return (
            f"tried {self.tried}, refused {self.refused}, right {self.right}{other},"
            f" wrong {self.wrong}"
        )


# Damage: each takes a file, chance, and the other files.


def flip(path: Path, chance: random.Random, others: list[Path]) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def scribble(path: Path, chance: random.Random, others: list[Path]) -> None:
    """Some bytes in a row."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    piece = chance.randbytes(chance.randint(1, 64))[: len(content) - start]
    content[start : start + len(piece)] = piece
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random, others: list[Path]) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def extend(path: Path, chance: random.Random, others: list[Path]) -> None:
    with path.open("ab") as stream:
        stream.write(chance.randbytes(chance.randint(1, 4096)))


def grow(path: Path, chance: random.Random, others: list[Path]) -> None:
    """Sparse, beyond any memory."""
    os.truncate(path, 1 << 42)


def swap(path: Path, chance: random.Random, others: list[Path]) -> None:
    other, aside = chance.choice(others), path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def delete(path: Path, chance: random.Random, others: list[Path]) -> None:
    path.unlink()


def pipe(path: Path, chance: random.Random, others: list[Path]) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path, chance: random.Random, others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, chance: random.Random, others: list[Path]) -> None:
    """To another file, to itself, to a device."""
    path.unlink()
    path.symlink_to(chance.choice([chance.choice(others), path, Path("/dev/zero")]))


DAMAGES: tuple[Damage, ...] = (
    *(flip, flip, flip, scribble, scribble, truncate, extend, grow),
    *(swap, delete, pipe, directory, link),
)
#: What changes values, and leaves a checkpoint that may be whole.
OF_VALUES = (flip, scribble)


class Campaign:
    """Tries one after the other, the same for the same seed.

    Args:
        folder: room for two models and one damaged copy.
        seed: of all chance.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        config = small_config(hidden=256, vision_hidden=128, heads=8, kv_heads=2)
        self.checkpoint = write_checkpoint(folder / "checkpoint", config, shards=2)
        self.bundle = export_bundle(
            self.checkpoint,
            folder / "bundle",
            vision="int8",
            options=QuantOptions(naive=True, block=32),
        )
        with mock.patch.object(prepack, "LEAST_BYTES", 1 << 12):  # small weights, too
            prepare_bundle(self.bundle)
        self._of_bundle = answer(self.bundle)
        plain = export_bundle(self.checkpoint, folder / "plain")
        self._of_checkpoint = answer(plain)

    def bits(self, step: int = 1) -> Totals:
        """Flip every `step`-th bit of bundle.json, one at a time."""
        totals = Totals()
        text = (self.bundle / MANIFEST).read_bytes()
        whole = parse_manifest(as_object(parse_json(text)))
        for at in range(0, 8 * len(text), step):
            flipped = bytearray(text)
            flipped[at // 8] ^= 1 << at % 8
            totals.add(_read(bytes(flipped), whole), f"bit {at} of {MANIFEST}")
        return totals

    def bundles(self, number: int, totals: Totals) -> None:
        """Damage one file of a bundle, load and ask."""
        chance = random.Random(f"{self._seed} bundle {number}")
        damaged, what, _ = self._damaged(self.bundle, chance)
        low_memory = chance.random() < 0.5

        def ask() -> Said:
            inspect_bundle(damaged)
            return answer(damaged, low_memory=low_memory)

        totals.add(*self._outcome(ask, self._of_bundle, f"bundle {number}: {what}"))

    def checkpoints(self, number: int, totals: Totals) -> None:
        """Damage one file of a checkpoint, export, load and ask."""
        chance = random.Random(f"{self._seed} checkpoint {number}")
        damaged, what, vouched = self._damaged(self.checkpoint, chance)

        def ask() -> Said:
            return answer(export_bundle(damaged, self._folder / "exported", overwrite=True))

        what = f"checkpoint {number}: {what}"
        outcome, said = self._outcome(ask, self._of_checkpoint, what)
        if outcome == "wrong" and not vouched and said == what:
            outcome = "other"
        totals.add(outcome, said)

    def _damaged(self, source: Path, chance: random.Random) -> tuple[Path, str, bool]:
        """A damaged copy, what was done, and whether it would be seen for sure."""
        copy = self._folder / "damaged"
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(source, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file())
        path = chance.choice(files)
        damage = chance.choice(DAMAGES)
        damage(path, chance, [other for other in files if other != path])
        # A tokenizer cut off behind a piece is a smaller one.
        vouched = damage not in OF_VALUES and path.name != "tokenizer.model"
        return copy, f"{damage.__name__} {path.relative_to(copy)}", vouched

    def _outcome(self, ask: Callable[[], Said], right: Said, what: str) -> tuple[str, str]:
        """What a try came to; with an error that is not ours, what it was."""
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            return ("right" if ask() == right else "wrong"), what
        except InternVLEdgeError as error:
            long = len(str(error)) > 1000 + 2 * len(str(self._folder)) or "\n" in str(error)
            return ("wrong" if long else "refused"), f"{what}: {str(error)[:300]}"
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            return "wrong", f"{what}: {type(error).__name__} {str(error)[:300]}"
        finally:
            faulthandler.cancel_dump_traceback_later()


def answer(bundle: Path, **options: Any) -> Said:
    """What a bundle says, and the logits of its prompt."""
    model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0, **options)
    reply = model.generate("What is this?", [PICTURE], max_new_tokens=4)
    logits = model.logits(model.tokenizer.encode("What is this?"))
    return list(reply.token_ids), logits.tobytes()


def _read(text: bytes, whole: Manifest) -> str:
    try:
        return "right" if parse_manifest(as_object(parse_json(text))) == whole else "wrong"
    except (InternVLEdgeError, JsonError):
        return "refused"


def main() -> int:
    """Try for a time, and print the totals; exit status 1: something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(Path(name), arguments.seed)
        found = {"bits": campaign.bits(), "bundles": Totals(), "checkpoints": Totals()}
        number = 0
        while time.monotonic() < ends:
            campaign.bundles(number, found["bundles"])
            campaign.checkpoints(number, found["checkpoints"])
            number += 1
    for part, totals in found.items():
        print(f"{part}: {totals}")
        print("".join(f"  {fault}\n" for fault in totals.faults), end="")
    return 1 if any(totals.wrong for totals in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
