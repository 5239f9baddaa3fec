"""Work folders: where a command writes until it is done, beside its destination, under a lock.

    BUNDLE.work/
        internvl-edge-work.json   the marker; see `export.marker`
        new-4f0c1a9e/             what will take the destination's name
        old-77d01c3b/             what had it, while the two change places
        scratch-0b5e9a12/         what is needed for a moment
        calibration/              decisions so far; kept when a run is cut short

What a run that was killed left there is taken up or removed by the next one, which says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from internvl_edge.bundle.disk import free_bytes, full_disk, is_full, size_text
from internvl_edge.bundle.errors import CapacityError, LeftoverWarning, OutputError
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.output.marker import (
    MARKER,
    Claim,
    claim,
    is_marked,
    remove_abandoned,
)
from internvl_edge.export.output.ownership import foreign_files, is_published, remove_own
from internvl_edge.export.output.workspace import Workspace

SUFFIX = ".work"
CALIBRATION = "calibration"
NEW, OLD, SCRATCH = "new", "old", "scratch"
_KINDS = {NEW: "an unfinished result", SCRATCH: "scratch files"}
_FRESH = re.compile(rf"({NEW}|{OLD}|{SCRATCH})-[0-9a-f]{{8}}")
#: Room asked for beyond what is computed: graphs, tokenizer, manifest, file system overhead.
SLACK_BYTES = 16 << 20
#: Names that a message shows.
SHOWN = 3


class WorkFolder:
    """The work folder of one destination, held by this process; see `work_folder`.

    Attributes:
        path: of the folder.
        target: the destination.
    """

    def __init__(self, held: Claim, target: Path) -> None:
        self.path = held.path
        self.target = target
        self._held = held
        self._workspace: Workspace | None = None

    @property
    def calibration(self) -> Path:
        """The folder that keeps decisions."""
        return self.path / CALIBRATION

    def fresh(self, kind: str) -> Path:
        """Make an empty folder: `NEW` or `SCRATCH`.

        Its name is drawn: what a process of an earlier run still writes never comes into it.
        """
        path = self.path / f"{kind}-{secrets.token_hex(4)}"
        path.mkdir()
        return path

    def publish(self, new: Path) -> None:
        """Give a folder the destination's name; a published one that had it is removed.

        Raises:
            OutputError: what is there has files of somebody else by now; it stays as it is.
        """
        if os.path.lexists(self.target):
            check_replaceable(self.target)
        old = self.path / f"{OLD}-{secrets.token_hex(4)}"
        try:
            if os.path.lexists(self.target):
                self.target.rename(old)
            new.rename(self.target)
        finally:
            if old.exists():
                self._settle(old)

    def take_up(self) -> None:
        """Put in order what a run that was killed left, and say what became of it."""
        left = f"left by {self._held.previous or 'a run'}, which was cut short"
        for path in remove_abandoned(self.path):
            _say(f"removed {named(path)}, {left}")
        for path in self._fresh():
            if path.name.startswith(OLD):
                if self._settle(path):
                    _say(f"{self.target} is what it was: it was about to be replaced, {left}")
                else:
                    _say(f"removed the rest of what {self.target} replaced, {left}")
                continue
            kind, size = path.name.partition("-")[0], size_text(tree_bytes(path))
            shutil.rmtree(path)
            _say(f"removed {_KINDS[kind]} ({size}) from {self.path}, {left}")

    def open_calibration(self, key: str) -> Workspace:
        """Go on with the decisions of a run that was cut short, if they are of the same key."""
        workspace = self._workspace = Workspace(self.calibration, key)
        if workspace.discarded:
            _say(f"removed the calibration in {self.path}: {workspace.discarded}")
        elif workspace.resumed:
            done = f"{workspace.resumed} layers are done"
            _say(f"going on with the calibration in {self.path}: {done}")
        return workspace

    def drop_calibration(self) -> None:
        """Remove decisions that this export does not go on with, and say so."""
        if self.calibration.exists():
            _say(f"removed the calibration in {self.path}: this export needs none")
            self.forget_calibration()

    def forget_calibration(self) -> None:
        """Remove decisions that are no longer needed."""
        shutil.rmtree(self.calibration, ignore_errors=True)

    def close(self) -> None:
        """Remove what is not kept, and let go of the folder; it stays where something is left."""
        for path in self._fresh():
            if path.name.startswith(OLD):
                self._settle(path)
            else:
                shutil.rmtree(path, ignore_errors=True)
        if self._workspace is not None and not self._workspace.finished:
            self.forget_calibration()
        names = sorted(path.name for path in self.path.iterdir() if path.name != MARKER)
        if not names:
            self._held.remove()
            return
        self._held.release()
        others = [name for name in names if name != CALIBRATION]
        if others:
            say_kept(self.path, [self.path / name for name in others])
        else:
            size = size_text(tree_bytes(self.calibration))
            _say(f"kept the calibration so far in {self.path} ({size}): the same export goes on")

    def _fresh(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if _FRESH.fullmatch(path.name))

    def _settle(self, old: Path) -> bool:
        """Put back what was about to be replaced, or remove it where something took its place.

        What somebody put there in the meantime is kept. Returns whether it is back.
        """
        if not os.path.lexists(self.target):
            old.rename(self.target)
            return True
        if others := remove_own(old):
            kept = self.target.with_name(f"{self.target.name}.kept-{old.name.partition('-')[2]}")
            old.rename(kept)
            say_kept(kept, [kept / path.relative_to(old) for path in others])
        return False


@contextmanager
def work_folder(target: Path) -> Iterator[WorkFolder]:
    """Hold the folder beside a destination in which its content is made.

    Args:
        target: the destination, links followed; it need not exist.

    Raises:
        BusyError: another process works on this destination.
        OutputError: the place cannot be written, the name is too long, the disk is full (now or
            at any time within), or a folder of somebody else has the name.
    """
    path = _work_path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = WorkFolder(claim(path), target)
    except OSError as error:
        raise_unwritable(error, path)
    try:
        work.take_up()
        yield work
    except OSError as error:
        raise_unwritable(error, path)
    finally:
        with contextlib.suppress(OSError):  # what stays is marked: the next run removes it
            work.close()


def raise_unwritable(error: OSError, work: Path) -> NoReturn:
    """Raise OutputError, or CapacityError, for an error of writing a work folder or destination.

    An error about a file elsewhere, which was only read, is raised as it is.
    """
    if is_full(error):
        kept = "" if (work / CALIBRATION).exists() else "; nothing was kept"
        raise CapacityError(f"{full_disk(error, work)}{kept}") from error
    told = error.filename2 or error.filename
    path = work if told is None else Path(os.fsdecode(told))
    target = work.with_name(work.name.removesuffix(SUFFIX))
    if not str(path).startswith(str(target)) and not target.is_relative_to(path):
        raise error
    raise OutputError(f"cannot write {named(path)}: {reason(error)}") from error


def check_replaceable(folder: Path) -> None:
    """Check that everything in a folder was published by this program.

    Raises:
        BusyError: a process is adding to it.
        OutputError: it is not published, or somebody else's files are in it.
    """
    if not folder.is_dir() or not is_published(folder):
        raise OutputError(
            f"{folder} is not a bundle, nor a part of one that this program wrote, so it will not"
            " be replaced; remove it first"
        )
    for path in foreign_files(folder):
        if is_marked(path):
            claim(path).remove()
            _say(f"removed {named(path)}, left by a run that was cut short")
    if others := foreign_files(folder):
        names = _some([str(path.relative_to(folder)) for path in others])
        raise OutputError(
            f"{folder} will not be replaced: this program did not write {names}, which would be"
            " lost; move that elsewhere or choose another output"
        )


def check_space(target: Path, needed: int, what: str = "the bundle") -> None:
    """Raise CapacityError unless the disk that will hold a path has room for so many bytes."""
    parent = target.absolute().parent
    try:
        free = free_bytes(parent)
    except OSError as error:
        raise OutputError(f"cannot write to {named(parent)}: {reason(error)}") from error
    if free < needed + SLACK_BYTES:
        raise CapacityError(
            f"{named(parent)} has {size_text(free)} free, {what} takes {size_text(needed)}",
            needed,
            free,
            [Remedy.FREE_SPACE, Remedy.OTHER_DISK],
        )


def reusable_bytes(target: Path) -> int:
    """Return what an earlier run left for a destination: it is used again or removed."""
    path = _work_path(target)
    return tree_bytes(path) if is_marked(path) else 0


def tree_bytes(folder: Path) -> int:
    """Add up the sizes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def say_kept(folder: Path, others: list[Path]) -> None:
    """Say which files of somebody else a folder was kept for, if any."""
    if others:
        names = _some([str(path.relative_to(folder)) for path in others])
        _say(f"kept {folder}: this program did not write {names}")


def _work_path(target: Path) -> Path:
    return target.with_name(f"{target.name}{SUFFIX}")


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _say(text: str) -> None:
    warnings.warn(text, LeftoverWarning, stacklevel=3)
