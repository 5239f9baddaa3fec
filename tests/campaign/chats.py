"""Questions that keep rows of pictures on disk, ended at random moments.

    cd tests && python -m campaign.chats --seconds 300

A question is killed, interrupted, forbidden to let a file grow, left without room on its disk, or
asked twice at once of one folder. What is wrong with the folder costs no answer: only those that
were killed or interrupted may have none. Whole rows in it are those of a run that nothing happened
to, and the next run answers as that one did.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from checkpoints import small_config, write_checkpoint
from disks import NoDiskError, small_disk
from PIL import Image

from campaign.kills import DISK_BYTES, PATIENCE, FaultError, Totals
from internvl_edge.export.bundle import export_bundle

COMMAND = "import sys; from internvl_edge.cli.main import main; sys.exit(main(sys.argv[1:]))"
ROWS = "*.rows"
#: What an end by a signal may look like, and a whole answer. 1 is Python's own, where Ctrl-C comes
#: before the command line's first statement.
ENDED = (0, 1, 130, -signal.SIGKILL, -signal.SIGINT)


class Campaign:
    """Tries one after the other, the same for the same seed but for the machine's own timing.

    Args:
        folder: room for a small bundle.
        seed: of all chance.
        disk: a small one that may be filled; None where none can be mounted.
    """

    def __init__(self, folder: Path, seed: int, disk: Path | None) -> None:
        self._seed, self._disk = seed, disk
        self._rows = (disk or folder) / "rows"
        config = small_config(layers=1, vision_layers=1)
        self._bundle = export_bundle(write_checkpoint(folder / "c", config), folder / "bundle")
        self._picture = folder / "picture.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (300, 500, 3), np.uint8)
        Image.fromarray(pixels).save(self._picture)
        began = time.monotonic()
        self._answer = self._asked(self._start())
        self._seconds = time.monotonic() - began
        self._whole = {path.name: path.read_bytes() for path in self._rows.glob(ROWS)}

    def try_once(self, number: int, totals: Totals) -> None:
        """Ask a question that is ended in some way, look at the folder, and ask again."""
        chance = random.Random(f"{self._seed} {number}")
        ways: list[Callable[[random.Random], bool]] = [self._kill, self._interrupt, self._limit]
        ways += [self._pair] if self._disk is None else [self._pair, self._fill]
        way = ways[number % len(ways)]
        shutil.rmtree(self._rows, ignore_errors=True)
        totals.tried += 1
        try:
            answered = way(chance)
            self._look()
            if self._asked(self._start()) != self._answer:
                raise FaultError("the next run answered otherwise")
            self._look()
        except FaultError as error:
            totals.wrong += 1
            totals.faults.append(f"{number}, {way.__name__}: {error}")
            return
        totals.right += answered
        totals.refused += not answered

    # What happens to them; each says whether there was an answer.

    def _kill(self, chance: random.Random) -> bool:
        return self._end(chance, signal.SIGKILL)

    def _interrupt(self, chance: random.Random) -> bool:
        return self._end(chance, signal.SIGINT)

    def _end(self, chance: random.Random, sent: signal.Signals) -> bool:
        process = self._start()
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.1, 1.1) * self._seconds)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=PATIENCE)
        if process.returncode not in ENDED:
            raise FaultError(f"it ended with status {process.returncode}")
        if process.returncode == 0 and _tokens(output) != self._answer:
            raise FaultError("it answered otherwise")
        return process.returncode == 0

    def _limit(self, chance: random.Random) -> bool:
        """No file may grow beyond a size."""
        largest = max(map(len, self._whole.values()))
        return self._right(
            self._start("prlimit", f"--fsize={int(largest ** chance.uniform(0, 1))}")
        )

    def _fill(self, chance: random.Random) -> bool:
        """Somebody fills the disk, and makes room when the answer is there."""
        process = self._start()
        time.sleep(chance.uniform(0, 1) * self._seconds)
        ballast = self._rows.with_name("ballast")
        with suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(chance.choice((1 << 12, 1 << 16))))
        try:
            return self._right(process)
        finally:
            ballast.unlink()

    def _pair(self, chance: random.Random) -> bool:
        first = self._start()
        time.sleep(chance.uniform(0, 0.6) * self._seconds)
        second = self._start()
        return self._right(first) and self._right(second)

    # Asking and looking.

    def _start(self, *before: str) -> subprocess.Popen[str]:
        words = ["chat", self._bundle, self._picture, "-p", "What?", "--max-new-tokens", "6"]
        words += ["--device", "cpu", "--threads", "1", "--json", "--image-folder", self._rows]
        return subprocess.Popen(
            [*before, sys.executable, "-c", COMMAND, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _asked(self, process: subprocess.Popen[str]) -> list[int]:
        output, errors = process.communicate(timeout=PATIENCE)
        if process.returncode or "Traceback" in errors:
            raise FaultError(f"it ended with status {process.returncode}: {errors[-400:]}")
        return _tokens(output)

    def _right(self, process: subprocess.Popen[str]) -> bool:
        if self._asked(process) != self._answer:
            raise FaultError("it answered otherwise")
        return True

    def _look(self) -> None:
        """Whole rows are those of a run that nothing happened to."""
        for path in self._rows.glob(ROWS):
            if path.read_bytes() != self._whole.get(path.name):
                raise FaultError(f"{path.name} holds something else")


def _tokens(output: str) -> list[int]:
    return list(json.loads(output)["token_ids"])


@contextmanager
def opened(seed: int) -> Iterator[Campaign]:
    """A campaign with room of its own and, where one can be mounted, a disk to fill."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            disk = stack.enter_context(small_disk(folder / "disk", DISK_BYTES // 16)).path
        except NoDiskError as error:
            print(f"no disk is filled: {error}")
            disk = None
        yield Campaign(folder, seed, disk)


def main() -> int:
    """Try for a time, and print the totals; exit status 1: something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    totals, number, ends = Totals(), 0, time.monotonic() + arguments.seconds
    with opened(arguments.seed) as campaign:
        while time.monotonic() < ends:
            campaign.try_once(number, totals)
            number += 1
    print(f"chat: {totals}")
    print("".join(f"  {fault}\n" for fault in totals.faults), end="")
    return 1 if totals.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
