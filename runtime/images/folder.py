"""Rows of images kept beyond the process, in a folder that is bounded in bytes and in age.

It only ever saves work: whatever is wrong with it costs no answer, and is said once.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.files import open_regular
from internvl_edge.bundle.quoting import named, quoted
from internvl_edge.runtime.arguments import file_path, number_or, whole_or
from internvl_edge.runtime.images.identity import ImageIdentity

#: What a folder may hold, unless told otherwise: 50 images of 13 tiles of the 26B in float32.
FOLDER_BYTES = 4 << 30
#: Days after which rows that nobody read are removed.
FOLDER_DAYS = 90.0

_SUFFIX = ".rows"
#: Names of files that this program wrote, the first versions' too: nothing else is ever removed.
_OURS = re.compile(r"([0-9a-f]{64}|[0-9a-f]{16}-[0-9a-f]{68})\.rows|\.rows-\w+\.partial")
_DIGEST_BYTES = 32
#: A file that was being written this long ago has no writer any more.
_ABANDONED_S = 3600.0
#: Looked at again after writing this share of the limit: other processes write there, too.
_SHARE = 16

_log = logging.getLogger("internvl_edge")


@dataclass(frozen=True)
class _Kept:
    path: str
    nbytes: int
    used: float  # seconds since the epoch


class ImageFolder:
    """Rows on disk, one file an image: a NumPy array followed by a sha256 of identity and array.

    Args:
        path: created when it is first written to.
        limit: bytes; what was used longest ago is removed first. Several processes may together
            go beyond it by a sixteenth each.
        days: since the last use, after which rows are removed.

    Raises:
        UsageError: a bound is not positive, or `path` is a file.
    """

    def __init__(self, path: Path, *, limit: int = FOLDER_BYTES, days: float = FOLDER_DAYS) -> None:
        if limit < 1:
            raise UsageError(
                f"is {quoted(limit)}, it must be at least 1", option="image_folder_bytes"
            )
        if not days > 0:
            raise UsageError(
                f"is {quoted(days)}, it must be more than 0", option="image_folder_days"
            )
        if path.exists() and not path.is_dir():
            raise UsageError(f"{named(path)} is a file; name a folder", option="image_folder")
        self._path = path
        self._limit = limit
        self._age_s = days * 24 * 3600
        self._lock = threading.Lock()
        self._held: int | None = None  # bytes; None: not looked yet
        self._written = 0  # bytes since the last look
        self._warned = False

    def load(self, image: ImageIdentity) -> NDArray[np.floating] | None:
        """Rows saved before; None where there are none or the file is damaged or another's."""
        file = self._file(image)
        try:
            with open_regular(file) as stream:
                data = stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", error)
            return None
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if _sealed(image, body) != digest:
            return None
        self._touch(file)
        return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))

    def save(self, image: ImageIdentity, rows: NDArray[np.floating]) -> None:
        """Write rows beside their place and rename, so that a reader never meets half a file."""
        stream = io.BytesIO()
        np.save(stream, rows)
        body = stream.getvalue()
        nbytes = len(body) + _DIGEST_BYTES
        if nbytes > self._limit:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._make_room(nbytes)
            self._write(self._file(image), body + _sealed(image, body))
        except OSError as error:
            self._warn("write", error)

    def _write(self, target: Path, data: bytes) -> None:
        handle, aside = tempfile.mkstemp(dir=self._path, prefix=f"{_SUFFIX}-", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(aside, target)
        finally:
            Path(aside).unlink(missing_ok=True)  # renamed, or an error or Ctrl-C came between

    def _make_room(self, nbytes: int) -> None:
        """Count `nbytes` more, and remove what is too old or too much."""
        with self._lock:
            looked = self._held is not None and self._written <= self._limit // _SHARE
            held = self._held if looked and self._held is not None else 0
            if not looked or held + nbytes > self._limit:
                held, self._written = self._sweep(self._limit - nbytes), 0
            self._held = held + nbytes
            self._written += nbytes

    def _sweep(self, room: int) -> int:
        """Remove old files, and the oldest of the others until they take `room` bytes at most."""
        now = time.time()
        files = sorted(self._kept(), key=lambda file: file.used)
        held = sum(file.nbytes for file in files)
        for file in files:
            partial = file.path.endswith(".partial")
            age = _ABANDONED_S if partial else self._age_s
            if now - file.used > age or (held > room and not partial):
                Path(file.path).unlink(missing_ok=True)
                held -= file.nbytes
        return held

    def _kept(self) -> list[_Kept]:
        found = []
        with os.scandir(self._path) as entries:
            for entry in entries:
                if not _OURS.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process removed it
                    continue
                found.append(_Kept(entry.path, status.st_size, status.st_mtime))
        return found

    def _touch(self, file: Path) -> None:
        """Note the use, where the folder may be written."""
        try:
            os.utime(file)
        except OSError as error:
            self._warn("write", error)

    def _warn(self, verb: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            reason = error.strerror or error
            _log.warning(
                "cannot %s the image folder %s: %s; images are encoded anew",
                verb,
                self._path,
                reason,
            )

    def _file(self, image: ImageIdentity) -> Path:
        return self._path / f"{image.digest.hex()}{_SUFFIX}"


def _sealed(image: ImageIdentity, body: bytes) -> bytes:
    """sha256 that ties an array to its image: a file under another image's name is not taken."""
    digest = hashlib.sha256(image.digest)
    digest.update(body)
    return digest.digest()


def folder_or_none(path: Any, limit: Any, days: Any) -> ImageFolder | None:
    """Take the arguments of `InternVL.load`; None: no folder is asked for.

    Raises:
        UsageError: one is none; the message names it.
    """
    if path is None:
        return None
    return ImageFolder(
        file_path("image_folder", path),
        limit=whole_or("image_folder_bytes", limit, FOLDER_BYTES),
        days=number_or("image_folder_days", days, FOLDER_DAYS),
    )
