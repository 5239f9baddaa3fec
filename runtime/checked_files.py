"""Large files whose content was checked on this machine, so that it need not be at every start."""

from __future__ import annotations

import hashlib
import os
import time

from internvl_edge.runtime.backends.trials import recalled, remember

#: Smaller ones are read in less time than a user notices.
LEAST_BYTES = 64 << 20
#: A file that was changed so shortly before it was read may be changed again at the same time of
#: the file system's clock.
SETTLED_S = 2.0
_CHECKED = "checked"


class CheckedFiles:
    """`KnownFiles` in the user's cache.

    A file is known by its device, inode, size, and when its content and its inode last changed:
    whatever writes to it through the file system changes the last of these.
    """

    def knows(self, status: os.stat_result, sha256: str) -> bool:
        """Whether the file that has this status was found to have this sha256."""
        return status.st_size >= LEAST_BYTES and recalled(_key(status, sha256)) == _CHECKED

    def remember(self, status: os.stat_result, sha256: str) -> None:
        """Keep that it has, if it is large and has not just been written."""
        if status.st_size >= LEAST_BYTES and time.time() - status.st_ctime > SETTLED_S:
            remember(_key(status, sha256), _CHECKED)


def _key(status: os.stat_result, sha256: str) -> str:
    parts = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        sha256,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
