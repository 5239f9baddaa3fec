"""Whose files are these: what this program wrote into a bundle, and what somebody else put there.

A folder it publishes has a manifest that lists its files: bundle.json, and below it
prepared/*/prepared.json and engines/*/engines.json. Only what a manifest lists is ever removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.bundle import manifest as bundle
from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.json_reader import JsonError, read_json
from internvl_edge.runtime.backends import plans as engines
from internvl_edge.runtime.backends import prepared


@dataclass(frozen=True)
class Kind:
    """A kind of published folder.

    Attributes:
        manifest: the file that lists the others.
        format: what stands there under "format"; None: nothing does.
        known: pattern of the other files' names; it counts where the manifest is damaged, which
            one without a format does not show.
    """

    manifest: str
    format: str | None
    known: str


KINDS = (
    Kind(
        MANIFEST,
        bundle.FORMAT,
        r"(vision|language)\.(onnx|data)|embedding(\.scales)?\.npy|quantisation\.(json|svg)"
        r"|tokenizer\.model|tokenizer_config\.json|added_tokens\.json|special_tokens_map\.json",
    ),
    Kind(prepared.MANIFEST, None, r"(vision|language)(\.\d+)?\.(onnx|data)"),
    Kind(engines.MANIFEST, engines.FORMAT, r"(vision|language)\.plan|layers\.json"),
)
#: Folders of a bundle that hold published ones.
ROOMS = (prepared.FOLDER, engines.FOLDER)


def is_published(folder: Path) -> bool:
    """Return whether a folder, or what a link leads to, has a manifest of this program."""
    return any(_listed(folder, kind) is not None for kind in KINDS)


def own_files(folder: Path) -> list[Path]:
    """List what this program wrote into a published folder; manifests come last.

    What lies behind a symbolic link to a directory is not looked at.
    """
    found = [path for inner in _published_below(folder) for path in own_files(inner)]
    manifests = []
    for kind in KINDS:
        names = _listed(folder, kind)
        if names is not None:
            found += [folder / name for name in names]
            manifests.append(folder / kind.manifest)
    return [path for path in dict.fromkeys([*found, *manifests]) if _is_file(path)]


def foreign_files(folder: Path) -> list[Path]:
    """List what lies in a published folder that this program did not write.

    Directories that hold nothing of its own are named as a whole.
    """
    own = set(own_files(folder))
    rooms = {parent for path in own for parent in path.parents}
    return list(_others(folder, own, rooms | {folder / name for name in ROOMS}))


def remove_own(folder: Path) -> list[Path]:
    """Remove a published folder but for foreign files, which are returned.

    The manifests go last: a removal that is cut short can be taken up again.
    """
    own = own_files(folder)
    rooms = {parent for path in own for parent in path.parents if parent.is_relative_to(folder)}
    rooms |= {folder, *(room for name in ROOMS if _is_directory(room := folder / name))}
    for path in own:
        path.unlink(missing_ok=True)
    for room in sorted(rooms, key=lambda room: len(room.parts), reverse=True):
        if next(room.iterdir(), None) is None:
            room.rmdir()
    return list(_others(folder, set(), rooms)) if folder.exists() else []


def _published_below(folder: Path) -> list[Path]:
    rooms = [room for name in ROOMS if _is_directory(room := folder / name)]
    inner = [path for room in rooms for path in sorted(room.iterdir()) if _is_directory(path)]
    return [path for path in inner if is_published(path)]


def _others(folder: Path, own: set[Path], rooms: set[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path in rooms and _is_directory(path):
            yield from _others(path, own, rooms)
        elif path not in own:
            yield path


def _listed(folder: Path, kind: Kind) -> list[str] | None:
    """Return the names in a manifest, or those known of its kind where it is damaged; None: there
    is no such manifest, or it is another program's."""
    if not (manifest := folder / kind.manifest).is_file():
        return None
    try:
        data = read_json(manifest)
    except (OSError, JsonError):
        data = {"format": kind.format}
    if not isinstance(data, dict) or data.get("format") != kind.format:
        return None
    known, files = re.compile(kind.known), data.get("files")
    names = [name for name in files if Path(name).name == name] if isinstance(files, dict) else []
    if kind.format is None or not isinstance(files, dict):
        names += [path.name for path in folder.iterdir() if known.fullmatch(path.name)]
    return names


def _is_file(path: Path) -> bool:
    """Return whether a name is there and is no directory; a link counts as itself."""
    return path.is_symlink() or (path.exists() and not path.is_dir())


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
