"""What was verified is what is used: files that are opened again later, or stay mapped."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.files import FileIdentity, open_regular
from internvl_edge.bundle.quoting import named, reason


@dataclass(frozen=True)
class VerifiedFiles:
    """A folder's files, and what each was when it was checked.

    Attributes:
        path: of the folder.
        identities: by file name; of what is not named here nothing is known.
    """

    path: Path
    identities: Mapping[str, FileIdentity] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BundleError where a file was replaced, changed or removed since."""
        for name, identity in self.identities.items():
            if FileIdentity.at(self.path / name) != identity:
                raise _other(self.path / name)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Surround the opening of files by their paths: what is opened is what was verified.

        Raises:
            BundleError: a file was replaced, changed or removed, before or meanwhile.
        """
        self.check()
        try:
            yield
        except BundleError:
            self.check()  # which would be the cause
            raise
        self.check()

    def hold(self, names: Iterable[str]) -> HeldFiles:
        """Keep files open that are mapped already; see `HeldFiles`."""
        return HeldFiles(self, names)


class HeldFiles:
    """Mapped files, kept open to see whether their bytes change.

    Another file in the place of one is none of its bytes: a mapping stays what it was.

    Raises:
        BundleError: a file is not the one that was verified.
    """

    def __init__(self, files: VerifiedFiles, names: Iterable[str]) -> None:
        self._held: dict[Path, tuple[int, FileIdentity]] = {}
        weakref.finalize(self, _close, self._held)
        for name in names:
            path = files.path / name
            try:
                with open_regular(path) as stream:
                    descriptor = os.dup(stream.fileno())
            except OSError as error:
                raise BundleError(f"cannot read {named(path)}: {reason(error)}") from error
            identity = FileIdentity.of(os.fstat(descriptor))
            self._held[path] = descriptor, identity
            if files.identities.get(name, identity) != identity:
                raise _other(path)

    def check(self) -> None:
        """Raise BundleError where a file's bytes were changed since it was verified."""
        for path, (descriptor, identity) in self._held.items():
            if FileIdentity.of(os.fstat(descriptor)) != identity:
                raise _other(path)


def _other(path: Path) -> BundleError:
    return BundleError(
        f"{named(path)} was replaced or changed after it was verified; load the model again"
    )


def _close(held: Mapping[Path, tuple[int, FileIdentity]]) -> None:
    for descriptor, _ in held.values():
        os.close(descriptor)
