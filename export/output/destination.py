"""Where an export may write: never over its own source, never over somebody else's files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from internvl_edge.bundle.errors import OutputError
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.output.ownership import own_files
from internvl_edge.export.output.work import check_replaceable

#: Device and inode: what two names of one file or folder share, mounts and links included.
FileId = tuple[int, int]


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a destination is free, or may be replaced.

    Raises:
        BusyError: a process is adding to what is there.
        OutputError: it exists, is not a bundle, holds other files, or cannot be renamed.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(f"{named(target)} exists", [Remedy.OTHER_OUTPUT, Remedy.OVERWRITE])
    check_replaceable(target)
    if os.path.ismount(target):
        raise OutputError(
            f"{named(target)} is a mount, which cannot be replaced; give a folder inside it"
        )


def check_apart(target: Path, checkpoint: Path, data: Path | None) -> None:
    """Check that writing `target` leaves a checkpoint and calibration data as they are.

    Args:
        target: the destination, links followed.
        data: folder or file of pictures.

    Raises:
        OutputError: one lies in the other, or they share files, under whatever names.
    """
    for what, source in (("checkpoint", checkpoint), ("calibration data", data)):
        if source is None:
            continue
        if _id(target) in {_id(path) for path in _upwards(source)} - {None}:
            raise OutputError(
                f"{named(target)} is, or holds, the {what} {named(source)}, which would be"
                " replaced",
                [Remedy.OTHER_OUTPUT],
            )
    if _id(checkpoint) in {_id(path) for path in _upwards(target)} - {None}:
        raise OutputError(
            f"{named(target)} lies in the checkpoint {named(checkpoint)}; choose an output"
            " outside of it"
        )
    if os.path.isdir(target):
        written = {_id(path): path for path in own_files(target)}
        for path in _files(checkpoint, data):
            if _id(path) in written.keys() - {None}:
                raise OutputError(
                    f"{named(written[_id(path)])} is the same file as {named(path)}, which is read",
                    [Remedy.OTHER_OUTPUT],
                )


def _files(checkpoint: Path, data: Path | None) -> Iterator[Path]:
    folders: Iterable[Path] = [checkpoint] if data is None else [checkpoint, data]
    for folder in folders:
        yield from folder.iterdir() if folder.is_dir() else [folder]


def _upwards(path: Path) -> Iterator[Path]:
    """A path, links followed, and the folders it lies in."""
    real = Path(os.path.realpath(path))
    yield real
    yield from real.parents


def _id(path: Path) -> FileId | None:
    """Return the identity of what a path leads to; None where there is nothing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
