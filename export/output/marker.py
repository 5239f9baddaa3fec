"""Marked folders: one that this program made to work in says so, and who is at work there now.

The marker is a file that is locked while its folder is in use. The kernel drops a lock with the
process that held it, however that ended, so process ids, which containers share, decide nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path

from internvl_edge.bundle.disk import full_disk, is_full
from internvl_edge.bundle.errors import BusyError, CapacityError, OutputError
from internvl_edge.bundle.json_reader import parse_json
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.remedies import Remedy

MARKER = "internvl-edge-work.json"
FORMAT = "internvl-edge work folder"
#: The marker has always this size: signing it anew takes no room on a full disk.
RECORD_BYTES = 512
#: Times a folder may appear or vanish while it is claimed.
ATTEMPTS = 20
#: What is added to a folder's name while it is made or removed.
_PASSING = r"-[0-9a-f]{8}"
SCRATCH = "internvl-edge-"


@dataclass(frozen=True)
class Holder:
    """Who works, or worked, in a folder; `since` is local time in ISO 8601."""

    pid: int
    host: str
    since: str

    @classmethod
    def here(cls) -> Holder:
        """Describe this process."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Claim:
    """A marked folder that this process holds.

    Attributes:
        previous: who held it before; None where it is new.
    """

    def __init__(self, path: Path, marker: FileIO, previous: Holder | None) -> None:
        self.path = path
        self.previous = previous
        self._marker = marker

    def release(self) -> None:
        """Let go of the folder; it stays."""
        self._marker.close()

    def remove(self) -> None:
        """Remove the folder with all that is in it, and let go of it.

        Under another name: nobody ever meets a folder of this one without its marker.
        """
        passing = _passing(self.path)
        self.path.rename(passing)
        try:
            _remove(passing)
        finally:
            self._marker.close()


def claim(path: Path, mode: int = 0o777) -> Claim:
    """Make a marked folder, or take one that nobody holds any more.

    Raises:
        BusyError: another process, or another thread of this one, holds it.
        OutputError: what is there is not marked, or the file system has no locks.
        OSError: it cannot be written.
    """
    for _ in range(ATTEMPTS):
        found = _take(path) if os.path.lexists(path) else _make(path, mode)
        if found is not None:
            return found
    raise OutputError(
        f"{named(path)} is made and removed all the time; end the other processes there"
    )


def is_marked(path: Path) -> bool:
    """Return whether a path is a folder that this program made to work in, and no link to one."""
    try:
        file = (path / MARKER).lstat()
        if not stat.S_ISDIR(path.lstat().st_mode) or not stat.S_ISREG(file.st_mode):
            return False
        return file.st_size == RECORD_BYTES and _record((path / MARKER).read_bytes()) is not None
    except OSError:
        return False


def remove_abandoned(path: Path) -> list[Path]:
    """Remove what processes that were killed while they made or removed a folder left beside it.

    Returns:
        The folders removed.
    """
    pattern = re.compile(re.escape(path.name) + _PASSING)
    return [found for found in _siblings(path.parent, pattern) if _removed(found)]


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder that is gone afterwards, and remove those of killed processes.

    Args:
        parent: where; None is the system's place for temporary files.

    Raises:
        OutputError: the disk is full, now or at any time within.
        OSError: it cannot be written.
    """
    place = Path(tempfile.gettempdir() if parent is None else parent)
    pattern = re.compile(SCRATCH + r"[0-9a-f]{8}" + f"({_PASSING})?")
    for found in _siblings(place, pattern):
        _removed(found)
    path = place / f"{SCRATCH}{secrets.token_hex(4)}"
    try:
        held = claim(path, mode=0o700)
        try:
            yield held.path
        finally:
            held.remove()
    except OSError as error:
        if not is_full(error):
            raise
        raise CapacityError(full_disk(error, path), remedies=[Remedy.FREE_SPACE]) from error


def _make(path: Path, mode: int) -> Claim | None:
    """Make a folder aside, marked and locked, and rename it; None where another was faster."""
    passing = _passing(path)
    passing.mkdir(mode)
    marker = None
    try:
        marker = (passing / MARKER).open("x+b", buffering=0)
        _lock(marker, path)
        _sign(marker)
        passing.rename(path)
        made = Claim(path, marker, None)
        marker = None
    except (FileNotFoundError, FileExistsError, BusyError):
        return None
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            return None
        raise
    finally:
        shutil.rmtree(passing, ignore_errors=True)  # it has its name now, or nobody wants it
        if marker is not None:
            marker.close()  # after that: what nobody holds is removed by others
    return made


def _take(path: Path) -> Claim | None:
    """Lock the marker of a folder that is there; None where the folder has gone meanwhile."""
    folder = _folder_id(path)
    if not is_marked(path):
        if folder is None or _folder_id(path) != folder or is_marked(path):
            return None  # another was looked at, or its marker while it was written
        raise OutputError(
            f"{named(path)} is in the way: it was not made by this program, which needs that name"
            " to work in; rename it or choose another output"
        )
    try:
        marker = (path / MARKER).open("r+b", buffering=0)
    except FileNotFoundError:
        return None
    try:
        _lock(marker, path)
        if not _is_at(marker, path / MARKER):
            marker.close()
            return None
        previous = _record(marker.read(RECORD_BYTES) or b"")
        _sign(marker)
    except BaseException:
        marker.close()
        raise
    return Claim(path, marker, previous)


def _folder_id(path: Path) -> tuple[int, int] | None:
    """Return what tells one folder of this name from the next; None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lock(marker: FileIO, path: Path) -> None:
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        marker.seek(0)
        holder = _record(marker.read(RECORD_BYTES)) or "another process"
        raise BusyError(
            f"{named(path)} is in use by {holder}; wait for it, end it, or choose another output"
        ) from None
    except OSError as error:
        raise OutputError(
            f"{named(path)} cannot be locked ({reason(error)}); choose an output on a local disk"
        ) from error


def _is_at(marker: FileIO, path: Path) -> bool:
    """Return whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(marker.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _sign(marker: FileIO) -> None:
    record = json.dumps({"format": FORMAT, **asdict(Holder.here())})
    left = record.encode().ljust(RECORD_BYTES - 1)[: RECORD_BYTES - 1] + b"\n"
    marker.seek(0)
    while left:
        left = left[marker.write(left) :]


def _record(content: bytes) -> Holder | None:
    """Who signed a marker; None where it is none."""
    try:
        data = parse_json(content)
        if data["format"] != FORMAT:
            return None
        return Holder(int(data["pid"]), str(data["host"]), str(data["since"]))
    except (ValueError, LookupError, TypeError):
        return None


def _passing(path: Path) -> Path:
    return path.with_name(f"{path.name}-{secrets.token_hex(4)}")


def _siblings(place: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Folders of a name; those of other users are none of our business."""
    named = [path for path in sorted(place.iterdir()) if pattern.fullmatch(path.name)]
    return [path for path in named if _is_mine(path)]


def _is_mine(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _removed(path: Path) -> bool:
    """Remove a folder that nobody holds, marked or empty; return whether it was there to remove."""
    try:
        if not is_marked(path):
            path.rmdir()
            return True
        found = _take(path)
    except (BusyError, OutputError, OSError):  # somebody holds it, or is just removing it
        return False
    if found is None:
        return False
    try:
        _remove(path)
    finally:
        found.release()
    return True


def _remove(path: Path) -> None:
    """Remove a marked folder, the marker last: a removal that is cut short can be taken up."""
    for inner in path.iterdir():
        if inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner)
        elif inner.name != MARKER:
            inner.unlink()
    (path / MARKER).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # without its marker, anybody may remove it
        path.rmdir()
