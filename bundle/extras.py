"""What an installation may lack: packages of an extra, the example."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_edge.bundle.errors import BundleError, MissingExtraError


@contextmanager
def extra_installed(extra: str) -> Iterator[None]:
    """Turn a missing package of an extra into an error that names the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this command needs the package {error.name}", extra=extra
        ) from error


def example_room() -> Path:
    """Directory of the installed tiny_ocr example."""
    folder = room("examples.tiny_ocr")
    if folder is None:
        raise BundleError("the tiny_ocr example is not installed; reinstall internvl-edge")
    return folder


def room(name: str) -> Path | None:
    """Return the folder of an installed package of this program; None where it is absent."""
    package = importlib.util.find_spec(f"internvl_edge.{name}")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    return Path(folders[0]) if folders else None
