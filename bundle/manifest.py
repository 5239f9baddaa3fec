"""Reading and checking a bundle: the directory `export` writes and the runtime loads.

bundle.json says what the model is, how each part is stored and the size and sha256 of every file.
It is written last, so a directory without it is not a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast, get_args

from internvl_edge.bundle.contract import (
    DIALECTS,
    EMBEDDING_SCALES,
    EMBEDDING_TABLE,
    LANGUAGE_FILES,
    MANIFEST,
    VISION_FILES,
    CachePrecision,
    DialectName,
    DialectTraits,
    LanguagePrecision,
    VisionPrecision,
)
from internvl_edge.bundle.errors import BundleError, PromptError
from internvl_edge.bundle.files import FileIdentity, check_no_pointer, open_regular
from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.prompt import get_template
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.seal import check_seal, sealed
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.bundle.verified import VerifiedFiles

FORMAT = "internvl-edge bundle"
FORMAT_VERSION = 1

Verify = Literal["once", "hash", "size"]

#: Keys of bundles written before there were seals.
_UNSEALED = frozenset(
    ("format", "version", "dialect", "precision", "parameters", "parts", "spec", "files")
)

_SHA256 = re.compile("[0-9a-f]{64}")
#: Digits of a digest that messages show.
_SHOWN = 12
#: Digits in which the digests of two contents never agree but for so many.
_FEW = 4

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

    @property
    def traits(self) -> DialectTraits:
        """What graphs of its dialect take and give."""
        return DIALECTS[self.dialect]

    def to_json(self) -> str:
        """The text of bundle.json, sealed."""
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dialect": self.dialect,
            "precision": self.precision,
            "parameters": dict(self.parameters),
            "parts": {name: vars(entry) for name, entry in self.parts.items()},
            "spec": self.spec.to_dict(),
            "files": {name: vars(entry) for name, entry in sorted(self.files.items())},
        }
        return json.dumps(sealed(content), indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle directory."""

    path: Path
    manifest: Manifest
    verify: Verify = "hash"  # how its files were checked
    identities: Mapping[str, FileIdentity] = field(default_factory=dict)  # when they were

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec

    @property
    def verified(self) -> VerifiedFiles:
        """Its files as they were when they were checked."""
        return VerifiedFiles(self.path, self.identities)

    def file(self, name: str) -> Path:
        return self.path / name


class KnownFiles(Protocol):
    """Files whose content was compared before."""

    def knows(self, status: os.stat_result, sha256: str) -> bool:
        """Whether the file that has this status was found to have this sha256."""

    def remember(self, status: os.stat_result, sha256: str) -> None:
        """Keep that it has."""


def open_bundle(
    path: str | Path, *, verify: Verify = "hash", known: KnownFiles | None = None
) -> Bundle:
    """Open and check a bundle.

    Args:
        path: directory holding bundle.json.
        verify: "hash" reads every file and compares its sha256; "once" leaves out those that are
            `known` and have not changed since; "size" compares sizes only (milliseconds, whatever
            the model's size).
        known: what "once" goes by; without it, it is "hash".

    Raises:
        BundleError: not a bundle, newer format, missing, resized or altered file.
    """
    if not isinstance(verify, str) or verify not in get_args(Verify):
        raise BundleError(
            f"verify is {quoted(verify)}, expected one of {', '.join(get_args(Verify))}"
        )
    directory = Path(path)
    manifest = read_manifest(directory)
    identities = {
        name: check_file(directory / name, entry, verify, known=known)
        for name, entry in manifest.files.items()
    }
    return Bundle(directory, manifest, verify, identities)


def read_manifest(directory: Path) -> Manifest:
    """Parse bundle.json without touching the other files.

    Raises:
        BundleError: it is missing, damaged, of a newer format, or contradicts itself.
    """
    source = directory / MANIFEST
    try:
        data = read_object(source)
    except FileNotFoundError:
        raise BundleError(
            f"{named(directory)} is not a bundle: it has no {MANIFEST}; write one with"
            " 'internvl-edge export CHECKPOINT -o BUNDLE'"
        ) from None
    except NotADirectoryError:
        raise BundleError(
            f"{named(directory)} is no folder; a bundle is one with a {MANIFEST}"
        ) from None
    except (OSError, JsonError) as error:
        raise BundleError(f"cannot read {named(source)}: {reason(error)}") from error
    return parse_manifest(data, named(source))


def parse_manifest(data: Mapping[str, Any], label: str = MANIFEST) -> Manifest:
    """Check the content of bundle.json; `label` is what messages call it.

    Raises:
        BundleError: it is damaged, of a newer format, or contradicts itself.
    """
    if data.get("format") != FORMAT:
        raise BundleError(f"{label} does not describe an {FORMAT}")
    version = data.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BundleError(
            f"{label} has format version {quoted(version)}, this runtime reads {FORMAT_VERSION};"
            " update internvl-edge or export the checkpoint again"
        )
    try:
        check_seal(data, older=_UNSEALED)
    except JsonError as error:
        raise BundleError(
            f"{label} is damaged: {error}; copy the bundle again or export it anew"
        ) from error
    spec = ModelSpec.from_dict(_object(data, "spec"))
    try:
        get_template(spec.prompt.template)
    except PromptError as error:
        raise BundleError(f"{MANIFEST}: {error}") from error
    precision: dict[str, Any] = {part: _precision(data, part) for part in _PRECISIONS}
    return Manifest(
        spec=spec,
        dialect=_dialect(data),
        **precision,
        parameters={name: _count(name, n) for name, n in _object(data, "parameters").items()},
        files=_files(data, (EMBEDDING_SCALES,) if precision["embedding"] == "int8" else ()),
        parts=_parts(data) if "parts" in data else {},
    )


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as it is."""
    return FileEntry(path.stat().st_size, sha256_file(path))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with open_regular(path) as stream:
        return sha256_stream(stream)


def sha256_stream(stream: BinaryIO) -> str:
    """Hex sha256 of what is left of an open file."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def check_file(
    path: Path,
    entry: FileEntry,
    verify: Verify,
    remedy: str = "copy the bundle again or export it anew",
    known: KnownFiles | None = None,
) -> FileIdentity:
    """Check that a file is there, has its size and, on request, its hash; see `open_bundle`.

    Returns:
        What the file was meanwhile, for whoever opens it later.

    Raises:
        BundleError: it is missing, no regular file, or another.
    """
    try:
        with open_regular(path) as stream:
            status = os.fstat(stream.fileno())
            identity = FileIdentity.of(status)
            if identity.size != entry.bytes:
                check_no_pointer(path)
            is_known = verify == "once" and known is not None and known.knows(status, entry.sha256)
            hashed = verify != "size" and not is_known and identity.size == entry.bytes
            digest = sha256_stream(stream) if hashed else entry.sha256
            changed = FileIdentity.of(os.fstat(stream.fileno())) != identity
    except FileNotFoundError as error:
        raise BundleError(f"{named(path)} is missing; {remedy}") from error
    except OSError as error:
        raise BundleError(f"cannot read {named(path)}: {reason(error)}; {remedy}") from error
    if changed:
        raise BundleError(f"{named(path)} was written to while it was read; try again")
    if identity.size != entry.bytes:
        raise BundleError(
            f"{named(path)} has {identity.size} bytes, expected {entry.bytes}; {remedy}"
        )
    if digest != entry.sha256:
        raise BundleError(f"{_difference(named(path), digest, entry.sha256)}; {remedy}")
    if hashed and known is not None:
        known.remember(status, entry.sha256)
    return identity


def _difference(path: str, digest: str, listed: str) -> str:
    """Say which of the two is wrong, and where they differ."""
    places = [
        place for place, pair in enumerate(zip(digest, listed, strict=True)) if len(set(pair)) > 1
    ]
    first = places[0] if places[0] >= _SHOWN else 0
    got, expected = (
        f"{'...' * (first > 0)}{text[first : first + _SHOWN]}..." for text in (digest, listed)
    )
    if len(places) <= _FEW:  # of another content about 60 digits differ
        return (
            f"the sha256 that is listed for {path} is damaged: {len(places)} of its 64 digits"
            f" differ, {expected} instead of {got}"
        )
    return f"{path} was altered: sha256 {got}, expected {expected}"


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
        f"{MANIFEST}: dialect is {quoted(data.get('dialect'))}, this runtime reads"
        f" {', '.join(get_args(DialectName))}; export the checkpoint again"
    )


def _precision(data: Mapping[str, Any], part: str) -> Any:
    value = _object(data, "precision").get(part)
    known = get_args(_PRECISIONS[part])
    if value not in known:
        raise BundleError(
            f"{MANIFEST}: precision.{part} is {quoted(value)}, expected one of {', '.join(known)}"
        )
    return value


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise BundleError(f"{MANIFEST}: {named(name)} is {quoted(value)}, expected a whole number")
    return value


def _parts(data: Mapping[str, Any]) -> dict[str, PartEntry]:
    parts = {}
    for name in (entries := _object(data, "parts")):
        entry = _object(entries, name)
        counts = {label: _count(name, n) for label, n in _object(entry, "precision").items()}
        parts[name] = PartEntry(_count(f"{name} bytes", entry.get("bytes")), counts)
    return parts


def _files(data: Mapping[str, Any], more: Sequence[str]) -> dict[str, FileEntry]:
    """The files a bundle has; those that any has and `more` must be among them."""
    files = {}
    for name, entry in _object(data, "files").items():
        plain = Path(name).name == name and name.isprintable() and "\\" not in name
        if not plain or name in ("", "..", MANIFEST):
            raise BundleError(f"{MANIFEST} names a file outside the bundle: {quoted(name)}")
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise BundleError(
                f"{MANIFEST}: the entry of {quoted(name)} is damaged: {quoted(entry)}; copy the"
                " bundle again or export it anew"
            )
        files[name] = FileEntry(_count(f"{name} bytes", entry.get("bytes")), digest)
    for needed in (*VISION_FILES, *LANGUAGE_FILES, EMBEDDING_TABLE, *more):
        if needed not in files:
            raise BundleError(f"{MANIFEST} does not list {needed}; export the checkpoint again")
    return files
