"""Bundles whose weights are stored as this machine's kernels want them; see `export.prepack`.

A bundle directory may hold `prepared/<machine key>/` with both graphs again, their matrices packed
for one version of ONNX Runtime on one kind of CPU. Another version or CPU looks for another key, so
a stale directory is never used; `internvl-edge prepare` writes the one that fits. A large graph is
there in parts that load at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_edge.bundle.contract import (
    LANGUAGE_FILES,
    LANGUAGE_GRAPH,
    VISION_FILES,
    VISION_GRAPH,
)
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.json_reader import JsonError
from internvl_edge.bundle.manifest import Bundle, FileEntry, Manifest, check_file
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.seal import SEAL, read_sealed, sealed
from internvl_edge.bundle.verified import VerifiedFiles
from internvl_edge.runtime.backends.machine import machine_key
from internvl_edge.runtime.backends.products import AS_STORED, bundle_form

FOLDER = "prepared"
MANIFEST = "prepared.json"
#: A head of more bytes is stored in parts: loading packs one matrix at a time.
WIDEST_BYTES = 128 << 20
#: A graph of more bytes is stored in parts: loading packs the matrices of each on one core. (The
#: 26B's language graph is three, its vision graph two.)
PART_BYTES = 4 << 30

PREPARE_AGAIN = "run 'internvl-edge prepare --overwrite' on the bundle"


def superseded(folder: Path) -> list[Path]:
    """What other versions of ONNX Runtime left beside `folder` for the same kind of CPU."""
    cpu = folder.name.split("-", 2)[2]
    others = folder.parent.glob(f"onnxruntime-*-{cpu}")
    return [other for other in others if other != folder and (other / MANIFEST).exists()]


def part_count(manifest: Manifest, graph: str) -> int:
    """Of how many parts the packed form of a graph is."""
    if graph == VISION_GRAPH:
        files, layers = VISION_FILES, manifest.spec.vision.layers_run
    else:
        files, layers = LANGUAGE_FILES, manifest.spec.language.num_hidden_layers
    nbytes = sum(manifest.files[name].bytes for name in files)
    return max(1, min(layers, -(-nbytes // PART_BYTES)))


def part_names(graph: str, count: int) -> list[str]:
    """Names of a graph's parts: language.onnx, language.1.onnx, ...; each has a .data file."""
    return [graph, *(graph.replace(".", f".{number}.") for number in range(1, count))]


def prepared_folder(bundle: Bundle) -> Path:
    """Where this machine's packed graphs of a bundle belong."""
    return bundle.path / FOLDER / machine_key()


def prepared_manifest(bundle: Bundle, files: Mapping[str, FileEntry]) -> str:
    """JSON that ties packed graphs to the bundle they were made from."""
    entries = {name: vars(entry) for name, entry in sorted(files.items())}
    return json.dumps(sealed(_origin(bundle) | {"files": entries}), indent=2)


def is_prepared(bundle: Bundle) -> bool:
    """Whether there are packed graphs for this machine and this bundle; files may be damaged."""
    try:
        return _manifest(bundle) is not None
    except BundleError:
        return False


def why_none(bundle: Bundle) -> str | None:
    """Explain why what was prepared is not used here and how to mend it; None: nothing was."""
    folder = prepared_folder(bundle)
    if folder.is_dir():
        return (
            f"prepared weights in {named(folder)} were made from another export, or for products"
            f" that are not exact on this CPU; {PREPARE_AGAIN}"
        )
    others = sorted(path.name for path in folder.parent.glob("*") if (path / MANIFEST).exists())
    if not others:
        return None
    return (
        f"prepared weights in {named(folder.parent)} are for {', '.join(others)}, this is"
        f" {folder.name}; run 'internvl-edge prepare' on the bundle"
    )


def find_prepared(bundle: Bundle) -> Path | None:
    """The packed graphs that fit this machine and this bundle, or None; see `why_none`."""
    found = verified_prepared(bundle)
    return None if found is None else found.path


def verified_prepared(bundle: Bundle) -> VerifiedFiles | None:
    """Check the packed graphs that fit this machine and this bundle; None where there are none.

    Raises:
        BundleError: they are there, but damaged.
    """
    folder, data = prepared_folder(bundle), _manifest(bundle)
    if data is None:
        return None
    identities = {
        name: check_file(folder / name, entry, bundle.verify, PREPARE_AGAIN)
        for name, entry in _entries(bundle, data).items()
    }
    return VerifiedFiles(folder, identities)


def _manifest(bundle: Bundle) -> dict[str, Any] | None:
    """What lies there; None if nothing does, or what was made from another bundle."""
    path = prepared_folder(bundle) / MANIFEST
    try:
        data = read_sealed(path, older=(*_origin(bundle), "files"))
    except FileNotFoundError:
        return None
    except (OSError, JsonError) as error:
        raise BundleError(f"cannot read {named(path)}: {reason(error)}; {PREPARE_AGAIN}") from error
    if not _is_origin(data, bundle):
        return None
    return data


def _entries(bundle: Bundle, data: Mapping[str, Any]) -> dict[str, FileEntry]:
    path = prepared_folder(bundle) / MANIFEST
    try:
        entries = {
            str(name): FileEntry(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in data["files"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BundleError(f"{named(path)} is damaged; {PREPARE_AGAIN}") from None
    graphs = [
        name
        for graph in (VISION_GRAPH, LANGUAGE_GRAPH)
        for name in part_names(graph, part_count(bundle.manifest, graph))
    ]
    if set(entries) != {*graphs, *(str(Path(name).with_suffix(".data")) for name in graphs)}:
        raise BundleError(f"{named(path)} is damaged; {PREPARE_AGAIN}")
    return entries


def _is_origin(data: Mapping[str, Any], bundle: Bundle) -> bool:
    return {key: value for key, value in data.items() if key not in ("files", SEAL)} == _origin(
        bundle
    )


def _origin(bundle: Bundle) -> dict[str, Any]:
    """What packed graphs depend on besides the machine.

    Hashes of the graphs and of their weights, how both are cut, and, where it is not the stored
    one, the form of the integer products.
    """
    files = bundle.manifest.files
    source = {name: files[name].sha256 for name in (*VISION_FILES, *LANGUAGE_FILES)}
    form = bundle_form(bundle.manifest)
    forms = {} if form == AS_STORED else {"products": form.name}
    return {"source": source, "widest_bytes": WIDEST_BYTES, "part_bytes": PART_BYTES, **forms}
