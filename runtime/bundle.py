"""Reading and checking a bundle: the directory `export` writes and the runtime loads.

bundle.json says what the model is, how each part is stored and the size and sha256 of every file.
It is written last, so a directory without it is not a bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from internvl_edge.runtime.contract import (
    EMBEDDING_TABLE,
    LANGUAGE_FILES,
    MANIFEST,
    VISION_FILES,
    CachePrecision,
    DialectName,
    LanguagePrecision,
    VisionPrecision,
)
from internvl_edge.runtime.errors import BundleError, PromptError
from internvl_edge.runtime.prompt import get_template
from internvl_edge.runtime.specs import ModelSpec

FORMAT = "internvl-edge bundle"
FORMAT_VERSION = 1

Verify = Literal["hash", "size"]

_PRECISIONS: dict[str, Any] = {
    "vision": VisionPrecision,
    "language": LanguagePrecision,
    "kv": CachePrecision,
    "embedding": CachePrecision,
}


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class PartEntry:
    """One part of the weights: its bytes, and the number of its matrices at each precision."""

    bytes: int
    precision: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json. `parts` is empty in bundles written before there were any."""

    spec: ModelSpec
    dialect: DialectName
    vision: VisionPrecision
    language: LanguagePrecision
    kv: CachePrecision
    embedding: CachePrecision
    parameters: Mapping[str, int]
    files: Mapping[str, FileEntry]
    parts: Mapping[str, PartEntry] = field(default_factory=dict)

    @property
    def precision(self) -> dict[str, str]:
        """How each part is stored."""
        return {part: getattr(self, part) for part in _PRECISIONS}

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "dialect": self.dialect,
                "precision": self.precision,
                "parameters": dict(self.parameters),
                "parts": {name: vars(entry) for name, entry in self.parts.items()},
                "spec": self.spec.to_dict(),
                "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
            },
            indent=2,
            ensure_ascii=False,
        )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle directory."""

    path: Path
    manifest: Manifest
    verify: Verify = "hash"  # how its files were checked

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec

    def file(self, name: str) -> Path:
        return self.path / name


def open_bundle(path: str | Path, *, verify: Verify = "hash") -> Bundle:
    """Open and check a bundle.

    Args:
        path: directory holding bundle.json.
        verify: "hash" reads every file and compares its sha256; "size" compares sizes only
            (milliseconds, whatever the model's size).

    Raises:
        BundleError: not a bundle, newer format, missing, resized or altered file.
    """
    if verify not in get_args(Verify):
        raise BundleError(f"verify is {verify!r}, expected one of {', '.join(get_args(Verify))}")
    directory = Path(path)
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        check_file(directory / name, entry, verify)
    return Bundle(directory, manifest, verify)


def read_manifest(directory: Path) -> Manifest:
    """Parse bundle.json without touching the other files."""
    source = directory / MANIFEST
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST}; write one with"
            " 'internvl-edge export CHECKPOINT -o BUNDLE'"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise BundleError(f"cannot read {source}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{source} does not describe an {FORMAT}")
    version = data.get("version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{source} has format version {version!r}, this runtime reads {FORMAT_VERSION};"
            " update internvl-edge or export the checkpoint again"
        )
    spec = ModelSpec.from_dict(_object(data, "spec"))
    try:
        get_template(spec.prompt.template)
    except PromptError as error:
        raise BundleError(f"{MANIFEST}: {error}") from error
    return Manifest(
        spec=spec,
        dialect=_dialect(data),
        **{part: _precision(data, part) for part in _PRECISIONS},
        parameters={name: _count(name, n) for name, n in _object(data, "parameters").items()},
        files=_files(data),
        parts=_parts(data) if "parts" in data else {},
    )


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as it is."""
    return FileEntry(path.stat().st_size, sha256_file(path))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_file(
    path: Path,
    entry: FileEntry,
    verify: Verify,
    remedy: str = "copy the bundle again or export it anew",
) -> None:
    """Raise BundleError unless a file is there, has its size and, on request, its hash."""
    try:
        if not path.is_file():
            raise BundleError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        got = sha256_file(path) if verify == "hash" and size == entry.bytes else entry.sha256
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    if size != entry.bytes:
        raise BundleError(f"{path} has {size} bytes, expected {entry.bytes}; {remedy}")
    if got != entry.sha256:
        raise BundleError(
            f"{path} was altered: sha256 {got[:12]}..., expected {entry.sha256[:12]}...; {remedy}"
        )


def _object(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise BundleError(f"{MANIFEST} has no object '{key}'")
    return value


def _dialect(data: Mapping[str, Any]) -> DialectName:
    for name in get_args(DialectName):
        if data.get("dialect") == name:
            return cast("DialectName", name)
    raise BundleError(
        f"{MANIFEST}: dialect is {data.get('dialect')!r}, this runtime reads"
        f" {', '.join(get_args(DialectName))}; export the checkpoint again"
    )


def _precision(data: Mapping[str, Any], part: str) -> Any:
    value = _object(data, "precision").get(part)
    known = get_args(_PRECISIONS[part])
    if value not in known:
        raise BundleError(
            f"{MANIFEST}: precision.{part} is {value!r}, expected one of {', '.join(known)}"
        )
    return value


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise BundleError(f"{MANIFEST}: {name} is {value!r}, expected a whole number")
    return value


def _parts(data: Mapping[str, Any]) -> dict[str, PartEntry]:
    parts = {}
    for name in (entries := _object(data, "parts")):
        entry = _object(entries, name)
        counts = {label: _count(name, n) for label, n in _object(entry, "precision").items()}
        parts[name] = PartEntry(_count(f"{name} bytes", entry.get("bytes")), counts)
    return parts


def _files(data: Mapping[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for name, entry in _object(data, "files").items():
        plain = Path(name).name == name and name.isprintable() and "\\" not in name
        if not plain or name in ("", ".."):
            raise BundleError(f"{MANIFEST} names a file outside the bundle: {name!r}")
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise BundleError(f"{MANIFEST}: bad entry for file {name!r}: {entry!r}")
        files[name] = FileEntry(_count(f"{name} bytes", entry.get("bytes")), entry["sha256"])
    for needed in (*VISION_FILES, *LANGUAGE_FILES, EMBEDDING_TABLE):
        if needed not in files:
            raise BundleError(f"{MANIFEST} does not list {needed}; export the checkpoint again")
    return files
