"""Lines typed in earlier conversations: kept in the user's state folder, for this user alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from internvl_edge.bundle.files import check_regular, read_bytes, write_bytes

#: A file instead of the usual one; empty: nothing is kept.
VARIABLE = "INTERNVL_EDGE_HISTORY"
#: Lines that are left when a conversation begins; longer lines are not kept.
KEPT_LINES, LONGEST_LINE = 1000, 4096
#: Most bytes that are read: what several conversations at once may have added is little.
MOST_BYTES = 8 * KEPT_LINES * LONGEST_LINE


def history_path(environment: Mapping[str, str]) -> Path | None:
    """Return where typed lines are kept; None where they are not, or the user has no home."""
    if (chosen := environment.get(VARIABLE)) is not None:
        return Path(chosen) if chosen else None
    base = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, says the specification
        return Path(base) / "internvl-edge" / "history"
    with suppress(RuntimeError):
        return Path.home() / ".local" / "state" / "internvl-edge" / "history"
    return None


class History:
    """Lines of one file, which each conversation adds to as they are typed.

    A file that cannot be read or written costs nothing: nothing is remembered then, and what
    stands there is left as it is.

    Args:
        path: of the file, made when a line is added; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def lines(self) -> list[str]:
        """Return the newest lines, oldest first; older ones are removed from the file."""
        if self._path is None:
            return []
        try:
            content = read_bytes(self._path, MOST_BYTES)
            lines = content.decode(errors="replace").split("\n")[:-1]
            kept = lines[-KEPT_LINES:]
            if len(kept) < len(lines):
                text = "".join(f"{line}\n" for line in kept)
                write_bytes(self._path.resolve(), text.encode(), overwrite=True)
        except FileNotFoundError:
            return []
        except OSError:
            self._path = None
            return []
        return kept

    def add(self, line: str) -> None:
        """Write a line behind the others."""
        if self._path is None or len(line) > LONGEST_LINE:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._append(self._path, f"{line}\n".encode(errors="replace"))
        except OSError:
            self._path = None

    @staticmethod
    def _append(path: Path, content: bytes) -> None:
        if path.exists():
            check_regular(path)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "ab") as file:
            os.fchmod(handle, 0o600)
            file.write(content)
