"""Built TensorRT engines: where they lie in a bundle, and whether they are this machine's.

    BUNDLE/engines/sm87-tensorrt-10.16.2-4f0c1a9e21b7/
        engines.json    what they were built from, for and with
        vision.plan
        language.plan
        layers.json     how every matrix product is computed

A plan runs code. It is loaded only if engines.json knows its sha256, whatever `verify` says, and
if nothing that it depends on has changed since it was built.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.json_reader import JsonError
from internvl_edge.bundle.manifest import Bundle, FileEntry, check_file
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.seal import read_sealed, sealed
from internvl_edge.bundle.verified import VerifiedFiles
from internvl_edge.runtime.decoding.passes import MAX_CHUNK

FOLDER = "engines"
MANIFEST = "engines.json"
LAYERS = "layers.json"
FORMAT = "internvl-edge engines"
FORMAT_VERSION = 1

#: Plans by the graph they are built from.
PLANS = {VISION_GRAPH: "vision.plan", LANGUAGE_GRAPH: "language.plan"}

#: Builder flags engines are built with. REFIT stays out (it can drop a product's bias in TensorRT
#: 11.3), and so does VERSION_COMPATIBLE (a plan would bring its own runtime and host code).
FLAGS: tuple[str, ...] = ()

#: A published folder; one that is being written, or whose writer died, has a longer name.
_PUBLISHED = re.compile(r"sm\d+-[a-z_]+-[\w.+]+-[0-9a-f]{12}")


@dataclass(frozen=True)
class Limits:
    """The largest shapes an engine takes; the smallest are one row.

    Attributes:
        context: positions of the KV cache, fixed.
        tokens: most rows of one pass of the decoder.
        tiles: most tiles of one pass of the vision tower.
        rows: most rows that get logits in one pass.
        sequences: most sequences of one pass of the decoder.
    """

    context: int
    tokens: int = MAX_CHUNK
    tiles: int = 4
    rows: int = 8
    sequences: int = 1


@dataclass(frozen=True)
class Wanted:
    """What engines are to be for, at least; None takes what there is.

    Attributes:
        context: positions of the KV cache.
        sequences: of one pass of the decoder.
    """

    context: int | None = None
    sequences: int | None = None

    def command(self, bundle: Bundle) -> str:
        """Return what builds such engines."""
        options = [("--max-context", self.context), ("--max-sequences", self.sequences)]
        given = [f" {option} {value}" for option, value in options if value is not None]
        return f"internvl-edge build {named(bundle.path)}{''.join(given)}"


#: Whatever engines there are.
ANY = Wanted()


@dataclass(frozen=True)
class Machine:
    """What an engine depends on beside its graph.

    Attributes:
        sm: compute capability without the dot.
        library: "tensorrt" or "tensorrt_rtx".
        version: of the library.
        gpu: the device's own name; None for engines built without one.
        driver: CUDA version of the driver, 13020 is 13.2; None likewise.
    """

    sm: int
    library: str
    version: str
    gpu: str | None = None
    driver: int | None = None


@dataclass(frozen=True)
class EngineManifest:
    """The content of engines.json.

    Attributes:
        machine: what the engines were built on, or for.
        limits: see `Limits`.
        dialect, precision: of the bundle.
        flags: the builder's.
        source: sha256 of the graphs and of their weights, by file name.
        files: plans and report.
    """

    machine: Machine
    limits: Limits
    dialect: str
    precision: Mapping[str, str]
    flags: Sequence[str]
    source: Mapping[str, str]
    files: Mapping[str, FileEntry]

    @property
    def key(self) -> str:
        """Name of the folder."""
        return engine_key(self.machine, self.limits, self.precision, self.source, self.flags)

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": FORMAT_VERSION}
        return json.dumps(sealed(head | asdict(self)), indent=2)


@dataclass(frozen=True)
class Engines:
    """A folder with built engines and its manifest."""

    path: Path
    manifest: EngineManifest

    @contextmanager
    def plan(self, graph: str) -> Iterator[Path]:
        """Path of a graph's plan, to be read within: its hash is checked, and that it stays.

        Raises:
            BundleError: the plan is missing, or is not the one that was built.
        """
        name, remedy = PLANS[graph], "build the engines again"
        identity = check_file(self.path / name, self.manifest.files[name], "hash", remedy)
        with VerifiedFiles(self.path, {name: identity}).unchanged():
            yield self.path / name


def engine_key(
    machine: Machine,
    limits: Limits,
    precision: Mapping[str, str],
    source: Mapping[str, str],
    flags: Sequence[str],
) -> str:
    """`<sm>-<library>-<version>-<hash of graphs, limits, precision, flags and GPU>`."""
    content = [dict(source), asdict(limits), dict(precision), list(flags), machine.gpu]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"sm{machine.sm}-{machine.library}-{machine.version}-{digest[:12]}"


def source_hashes(bundle: Bundle) -> dict[str, str]:
    """sha256 of everything a plan is made from, as the bundle's manifest tells it."""
    stems = {Path(graph).stem for graph in PLANS}
    files = bundle.manifest.files
    return {name: files[name].sha256 for name in sorted(files) if Path(name).stem in stems}


def find_engines(bundle: Bundle, machine: Machine, wanted: Wanted = ANY) -> Engines | None:
    """The engines of a bundle that fit this machine and what is wanted: of the longest context, and
    of these those of the most sequences.

    Raises:
        BundleError: an engines.json is damaged.
    """
    fitting = [
        found
        for found in built_engines(bundle)
        if not changes(found.manifest, bundle, machine, wanted)
    ]

    def size(found: Engines) -> tuple[int, int]:
        return found.manifest.limits.context, found.manifest.limits.sequences

    return max(fitting, key=size, default=None)


def why_none(bundle: Bundle, machine: Machine, wanted: Wanted = ANY) -> str:
    """What there is instead, exactly what differs, and the command that helps."""
    remedy = f"run '{wanted.command(bundle)}'"
    found = built_engines(bundle)
    if not found:
        return f"{named(bundle.path)} has no engines for this machine; {remedy}"
    differing = [(changes(item.manifest, bundle, machine, wanted), item) for item in found]
    fewest, item = min(differing, key=lambda pair: len(pair[0]))
    return f"{named(item.path)} does not fit any more: {'; '.join(fewest)}; {remedy}"


def built_engines(bundle: Bundle) -> list[Engines]:
    """Every published folder of engines.

    Raises:
        BundleError: an engines.json is damaged.
    """
    root = bundle.path / FOLDER
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [
        Engines(folder, read_engine_manifest(folder))
        for folder in folders
        if _PUBLISHED.fullmatch(folder.name) and (folder / MANIFEST).exists()
    ]


def changes(
    manifest: EngineManifest, bundle: Bundle, machine: Machine, wanted: Wanted = ANY
) -> list[str]:
    """What is not as it was when the engines were built, for people; empty: they can be used.

    A newer driver runs what an older one did; an older one may not.
    """
    built, found = manifest.machine, []

    def compare(what: str, then: object, now: object) -> None:
        if then != now:
            found.append(f"{what} was {named(str(then))}, is {named(str(now))}")

    compare("TensorRT", f"{built.library} {built.version}", f"{machine.library} {machine.version}")
    compare("compute capability", built.sm, machine.sm)
    if built.gpu is not None:
        compare("GPU", built.gpu, machine.gpu)
    if built.driver is not None and machine.driver is not None and machine.driver < built.driver:
        compare("driver", built.driver, machine.driver)
    compare("dialect", manifest.dialect, bundle.manifest.dialect)
    compare("precision", dict(manifest.precision), bundle.manifest.precision)
    compare("builder flags", list(manifest.flags), list(FLAGS))
    source = source_hashes(bundle)
    for name in sorted(source.keys() | manifest.source.keys()):
        if source.get(name) != manifest.source.get(name):
            found.append(f"{name} is another file now")
    limits = manifest.limits
    if (wanted.context or 0) > limits.context:
        found.append(f"context was {limits.context}, {wanted.context} is asked for")
    if (wanted.sequences or 0) > limits.sequences:
        found.append(f"sequences were {limits.sequences}, {wanted.sequences} are asked for")
    return found


def read_engine_manifest(folder: Path) -> EngineManifest:
    """Parse engines.json.

    Raises:
        BundleError: unreadable, of another format, or damaged.
    """
    path = folder / MANIFEST
    remedy = f"delete {folder} and build the engines again"
    try:
        older = ("format", "version", *(field.name for field in fields(EngineManifest)))
        data = read_sealed(path, older)
    except (OSError, JsonError) as error:
        raise BundleError(f"cannot read {named(path)}: {reason(error)}; {remedy}") from error
    try:
        if (data["format"], data["version"]) != (FORMAT, FORMAT_VERSION):
            raise BundleError(f"{named(path)} is no {FORMAT} of version {FORMAT_VERSION}; {remedy}")
        manifest = EngineManifest(
            machine=Machine(**_typed(Machine, data["machine"])),
            limits=Limits(**_typed(Limits, data["limits"])),
            dialect=str(data["dialect"]),
            precision={str(k): str(v) for k, v in data["precision"].items()},
            flags=tuple(map(str, data["flags"])),
            source={str(k): str(v) for k, v in data["source"].items()},
            files={
                str(name): FileEntry(int(entry["bytes"]), str(entry["sha256"]))
                for name, entry in data["files"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{named(path)} is damaged ({reason(error)}); {remedy}") from error
    if not set(PLANS.values()) <= manifest.files.keys():
        raise BundleError(f"{named(path)} is damaged (it does not list both plans); {remedy}")
    return manifest


#: What engines.json did not tell at first, as it was then.
_ADDED: Mapping[str, int] = {"sequences": 1}

_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}


def _typed(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields, each of its type; numbers positive."""
    values = {}
    for field in fields(kind):
        value = {**_ADDED, **data}[field.name]
        wrong = not isinstance(value, _KINDS[str(field.type)]) or isinstance(value, bool)
        if wrong or (isinstance(value, int) and value < 1):
            raise ValueError(f"{field.name} is {quoted(value)}")
        values[field.name] = value
    return values
