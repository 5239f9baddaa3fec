"""Commands that write, ended at random moments: what is there is whole or nothing of its kind.

    cd tests && python -m campaign.kills --seconds 600

An export, a calibration, `prepare` and a build are killed, interrupted, left without room on their
disk, or started twice for one destination. After each, the destination is a whole bundle of one of
the recipes, or it is refused; files of somebody else beside and in it are there; and the next run
ends in the bytes of a run that nothing happened to, with nothing left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import small_config, write_checkpoint
from disks import NoDiskError, small_disk

from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.runtime import BundleError

#: The command line, calibrating on two pictures; `build` with the tests' stand-in for a builder.
COMMAND = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as the command line does
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
calibration_run.DEFAULT_ITEMS = 2
if sys.argv[1] == "build":
    import test_build_engines
    from internvl_edge.bundle.manifest import open_bundle
    from internvl_edge.bundle.errors import InternVLEdgeError
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        test_build_engines.build(open_bundle(sys.argv[2]), overwrite=True)
    except InternVLEdgeError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
sys.exit(main(sys.argv[1:]))
"""
INT = ("--vision", "int8", "--language", "int4", "--block", "32", "--no-sensitivity")
TESTS = Path(__file__).parents[1]
#: Seconds after which a command is taken to wait for something.
PATIENCE = 120
#: Of the disk that fills up.
DISK_BYTES = 64 << 20

Contents = Mapping[str, bytes]


@dataclass
class Totals:
    """What came of the tries.

    Attributes:
        tried: commands ended, or pairs.
        refused: after which there was nothing, or what the runtime refuses.
        right: after which there was a whole result.
        wrong: after which there was anything else, or the next run went wrong.
        faults: descriptions of the wrong ones.
    """

    tried: int = 0
    refused: int = 0
    right: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"tried {self.tried}, refused {self.refused}, right {self.right}, wrong {self.wrong}"


class FaultError(Exception):
    """Something is not as it must be."""


@dataclass(frozen=True)
class Subject:
    """A command under trial.

    Attributes:
        words: of the command, DESTINATION being the bundle it writes or adds to.
        other: words of another recipe for the same destination, where there is one.
        begin: makes the destination anew, perhaps empty; None: nothing is there before.
        result: what it is that the command writes below the destination.
    """

    words: tuple[str, ...]
    other: tuple[str, ...] | None = None
    begin: str | None = None
    result: str = "."


class Campaign:
    """Tries one after the other, the same for the same seed but for the machine's own timing.

    Args:
        folder: room for a few small bundles.
        seed: of all chance.
        disk: a small one that may be filled; None where none can be mounted.
    """

    def __init__(self, folder: Path, seed: int, disk: Path | None) -> None:
        self._folder, self._seed, self._disk = folder, seed, disk
        config = small_config(layers=1, vision_layers=1)
        self._checkpoint = write_checkpoint(folder / "checkpoint", config)
        self._subjects = self._make_subjects()
        self._whole: dict[tuple[str, ...], Contents] = {}
        self._seconds: dict[tuple[str, ...], float] = {}
        for subject in self._subjects.values():
            for words in filter(None, (subject.words, subject.other)):
                self._learn(subject, words)

    @property
    def names(self) -> list[str]:
        """Of the commands."""
        return list(self._subjects)

    def try_once(self, name: str, number: int, totals: Totals) -> None:
        """End a command in some way at some moment, look, and run it again."""
        chance = random.Random(f"{self._seed} {name} {number}")
        subject = self._subjects[name]
        ways: list[Callable[[Subject, Path, random.Random], str]] = [self._kill, self._interrupt]
        ways += [self._limit, self._pair]
        ways += [] if self._disk is None else [self._fill]
        way = ways[number % len(ways)]
        destination = self._destination(subject)
        what = f"{name} {number}"
        totals.tried += 1
        try:
            what = f"{what}: {way(subject, destination, chance)}"
            whole = self._look(subject, destination)
            self._finish(subject, destination)
        except FaultError as error:
            totals.wrong += 1
            totals.faults.append(f"{what}: {error}")
            return
        totals.right += whole
        totals.refused += not whole

    # The commands.

    def _make_subjects(self) -> dict[str, Subject]:
        source = str(self._checkpoint)
        export = ("export", source, "-o", "DESTINATION", "--overwrite")
        self._run(["export", source, "-o", str(self._folder / "int8"), *INT])
        self._run(["export", source, "-o", str(self._folder / "fp32")])
        trt = ("--vision", "fp16", "--language", "fp16", "--for", "tensorrt")
        self._run(["export", source, "-o", str(self._folder / "trt"), *trt])
        return {
            "export": Subject(export, (*export, "--vision", "fp16"), "trt"),
            "calibrate": Subject((*export, *INT), (*export, *INT, "--head", "int4")),
            "prepare": Subject(("prepare", "DESTINATION", "--overwrite"), None, "fp32", "prepared"),
            "build": Subject(("build", "DESTINATION"), None, "trt", "engines"),
        }

    def _destination(self, subject: Subject) -> Path:
        """A room of its own: the destination, if it exists before, and somebody's files beside."""
        room = (self._disk or self._folder) / "room"
        if room.exists():
            shutil.rmtree(room)
        room.mkdir()
        for name in ("m.calibration", "m.partial-1", "m.work.mine"):
            (room / name).mkdir()
            (room / name / "notes.txt").write_text(name)
        if subject.begin is not None:
            shutil.copytree(self._folder / subject.begin, room / "m")
        return room / "m"

    def _learn(self, subject: Subject, words: tuple[str, ...]) -> None:
        """What a command makes when nothing happens to it, and how long it takes."""
        destination = self._destination(subject)
        began = time.monotonic()
        self._run(_named(words, destination))
        self._seconds[words] = time.monotonic() - began
        self._whole[words] = contents(destination)

    # What happens to them.

    def _kill(self, subject: Subject, destination: Path, chance: random.Random) -> str:
        return self._end(subject, destination, chance, signal.SIGKILL)

    def _interrupt(self, subject: Subject, destination: Path, chance: random.Random) -> str:
        return self._end(subject, destination, chance, signal.SIGINT)

    def _end(
        self, subject: Subject, destination: Path, chance: random.Random, sent: signal.Signals
    ) -> str:
        """Send a signal once, or to several runs one after the other."""
        moments = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            process = _start(_named(subject.words, destination))
            moments.append(chance.uniform(0.1, 1.0) * self._seconds[subject.words])
            try:
                process.wait(moments[-1])
            except subprocess.TimeoutExpired:
                process.send_signal(sent)
            self._said(process, sent)
        return f"{sent.name} after {', '.join(f'{moment:.3f} s' for moment in moments)}"

    def _limit(self, subject: Subject, destination: Path, chance: random.Random) -> str:
        """No file may grow beyond a size."""
        largest = max(map(len, self._whole[subject.words].values()))
        limit = int(largest ** chance.uniform(0, 1))
        words = ["prlimit", f"--fsize={limit}", *_command(_named(subject.words, destination))]
        process = _start(words, plain=True)
        self._said(process, None)
        return f"files of at most {limit} bytes"

    def _fill(self, subject: Subject, destination: Path, chance: random.Random) -> str:
        """Somebody fills the disk, and makes room when the command has ended."""
        process = _start(_named(subject.words, destination))
        delay = chance.uniform(0.1, 1.0) * self._seconds[subject.words]
        time.sleep(delay)
        ballast = destination.with_name("ballast")
        with suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(chance.choice((1 << 12, 1 << 16, 1 << 20))))
        self._said(process, None)
        ballast.unlink()
        return f"the disk full after {delay:.3f} s"

    def _pair(self, subject: Subject, destination: Path, chance: random.Random) -> str:
        """Two at once, of two recipes where there are."""
        words = [subject.words, subject.other or subject.words]
        chance.shuffle(words)
        first = _start(_named(words[0], destination))
        delay = chance.uniform(0, 0.6) * self._seconds[words[0]]
        time.sleep(delay)
        second = _start(_named(words[1], destination))
        for process in (first, second):
            self._said(process, None)
        return f"two at once, the second after {delay:.3f} s"

    def _said(self, process: subprocess.Popen[str], sent: signal.Signals | None) -> None:
        """Wait for the end; errors are lines of ours."""
        try:
            _, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise FaultError("it waits for ever") from None
        if "Traceback" in errors and sent != signal.SIGINT:
            raise FaultError(f"a traceback: {errors[-600:]}")
        known = (0, 2, 130, -signal.SIGKILL, -signal.SIGINT, 1)
        if process.returncode not in known:
            raise FaultError(f"it ended with status {process.returncode}: {errors[-600:]}")

    # What is there afterwards.

    def _look(self, subject: Subject, destination: Path) -> bool:
        """Whether a whole result is there; it must be one, or none that is taken for one."""
        recipes = [words for words in (subject.words, subject.other) if words is not None]
        known = [self._whole[words] for words in recipes]
        if subject.begin is not None:
            known.append(contents(self._folder / subject.begin))
        self._check_others(destination)
        try:
            open_bundle(destination)
        except BundleError:
            return False
        found = contents(destination)
        if subject.result == "." and found not in known:
            raise FaultError("the bundle is of no recipe")
        if subject.result == ".":
            return True
        settled = {path: data for path, data in found.items() if ".work" not in path}
        if settled not in known:
            raise FaultError(f"{subject.result}: not those of a run that nothing happened to")
        return settled == known[0]

    def _finish(self, subject: Subject, destination: Path) -> None:
        """The next run ends in the right bytes, and leaves nothing."""
        self._run(_named(subject.words, destination))
        if contents(destination) != self._whole[subject.words]:
            raise FaultError("the next run gave other bytes")
        self._check_others(destination)
        left = {path.name for path in destination.parent.iterdir()}
        if left != {"m", "m.calibration", "m.partial-1", "m.work.mine"}:
            raise FaultError(f"left behind: {sorted(left)}")

    def _check_others(self, destination: Path) -> None:
        for name in ("m.calibration", "m.partial-1", "m.work.mine"):
            path = destination.parent / name / "notes.txt"
            if not path.exists() or path.read_text() != name:
                raise FaultError(f"{name} of somebody else was touched")

    def _run(self, words: list[str]) -> None:
        process = _start(words)
        _, errors = process.communicate(timeout=PATIENCE)
        if process.returncode:
            raise FaultError(f"{words[0]} in peace ended with {process.returncode}: {errors}")


def contents(folder: Path) -> Contents:
    """All files below a folder by path; what says when it was made is left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _named(words: tuple[str, ...], destination: Path) -> list[str]:
    return [str(destination) if word == "DESTINATION" else word for word in words]


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-c", COMMAND, *words]


def _start(words: list[str], *, plain: bool = False) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(TESTS / "export"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        words if plain else _command(words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths.rstrip(os.pathsep)},
    )


@contextmanager
def opened(seed: int) -> Iterator[Campaign]:
    """A campaign with room of its own and, where one can be mounted, a disk to fill."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            disk = stack.enter_context(small_disk(folder / "disk", DISK_BYTES)).path
        except NoDiskError as error:
            print(f"no disk is filled: {error}")
            disk = None
        yield Campaign(folder, seed, disk)


def main() -> int:
    """Try for a time, and print the totals; exit status 1: something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    arguments = parser.parse_args()
    with opened(arguments.seed) as campaign:
        found = {command: Totals() for command in campaign.names}
        number, ends = arguments.first, time.monotonic() + arguments.seconds
        while time.monotonic() < ends:
            for command, totals in found.items():
                campaign.try_once(command, number, totals)
            number += 1
    for command, totals in found.items():
        print(f"{command}: {totals}")
        print("".join(f"  {fault}\n" for fault in totals.faults), end="")
    return 1 if any(totals.wrong for totals in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
