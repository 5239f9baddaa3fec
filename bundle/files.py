"""Reading a user's files: regular ones only, without waiting, and never more than makes sense.

A pipe would be waited for, a device may have no end, and a size may be any number: all three are
refused before anything is opened or asked of memory. Failures are `OSError`s whose `strerror` ends
a sentence that begins with the path; callers make their typed errors of them.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: A tokenizer: the largest SentencePiece models known have 5 MB.
TOKENIZER_BYTES = 64 << 20
#: Lists of questions or pictures, read whole.
DATA_BYTES = 1 << 30

#: Read of a file that says it is empty, as those of /proc do.
_UNTOLD = 1 << 16

#: How a file begins that Git LFS keeps in the place of a large one.
_POINTER = b"version https://git-lfs.github.com/spec/"

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def at_home(path: str) -> str:
    """Replace a leading `~`, as a shell would have, unless a file has that very name."""
    if "\0" in path or not path.startswith("~") or os.path.lexists(path):
        return path
    return os.path.expanduser(path)


def check_regular(path: str | os.PathLike[str], limit: int | None = None) -> None:
    """Raise OSError unless a path leads to a regular file, of at most `limit` bytes."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a path that no file can have, such as one with NUL
        raise OSError(errno.EINVAL, f"it is no path: {error}") from error
    _check_mode(status.st_mode)
    _check_size(status.st_size, limit)


def check_no_pointer(path: str | os.PathLike[str]) -> None:
    """Raise OSError where a file is what Git keeps in the place of a large one."""
    with open_regular(path) as stream:
        _check_content(stream.read(len(_POINTER)))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    check_regular(path)  # before opening: that alone can wait, or do something
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    stream = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_mode(os.fstat(stream.fileno()).st_mode)  # another may stand there by now
    except OSError:
        stream.close()
        raise
    return stream


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        _check_size(size, limit)
        room = min(limit, max(size, _UNTOLD))
        content = stream.read(room + 1)
    if len(content) > room:
        raise OSError(errno.EFBIG, f"it has more than the {size} bytes it tells")
    _check_content(content)
    return content


def write_bytes(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write a whole file beside its place and rename it, so that nobody meets half of it.

    Raises:
        FileExistsError: something is there, and is not to be replaced, or is no regular file.
        OSError: it cannot be written.
    """
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


@dataclass(frozen=True)
class FileIdentity:
    """An identity that another file in its place, or the same one after a change, does not have."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity of the file that has this status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @classmethod
    def at(cls, path: Path) -> FileIdentity | None:
        """Return the identity of what stands at `path` now; None where nothing can be found."""
        try:
            return cls.of(os.stat(path))
        except (OSError, ValueError):
            return None


def _check_content(content: bytes) -> None:
    if content.startswith(_POINTER):
        raise OSError(
            errno.EINVAL,
            "it is a Git LFS pointer, not the file it stands for; run 'git lfs pull' in its folder,"
            " or download the file itself",
        )


def _check_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise OSError(errno.EFBIG, f"it has {size} bytes, at most {limit} are read")


def _check_mode(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    kind = next((name for test, name in _KINDS if test(mode)), "something else")
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
