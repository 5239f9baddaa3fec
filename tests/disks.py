"""Small disks of their own, for tests of full ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoDiskError(Exception):
    """A disk cannot be mounted here, and why."""


class Disk:
    """A mounted file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, nbytes: int) -> None:
        """Change its size; what it holds stays."""
        subprocess.run(
            ["mount", "-o", f"remount,size={nbytes}", str(self.path)],
            check=True,
            capture_output=True,
        )


@contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[Disk]:
    """A disk of so many bytes at `path`.

    Raises:
        NoDiskError: none can be mounted, for which most systems want root.
    """
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        refused = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        refused = "there is no mount"
    if refused:
        raise NoDiskError(f"a small disk cannot be mounted here: {refused}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
