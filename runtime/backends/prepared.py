"""Bundles whose weights are stored as this machine's kernels want them; see `export.prepack`.

A bundle directory may hold `prepared/<machine key>/` with graphs again, their matrices packed for
one version of ONNX Runtime on one kind of CPU: those graphs whose weights our own kernels do not
map as they are. Another version or CPU looks for another key, so a stale directory is never used;
`internvl-edge prepare` writes the one that fits.
"""

from __future__ import annotations

import itertools
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
from internvl_edge.bundle.manifest import Bundle, FileEntry, check_file
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.seal import SEAL, read_sealed, sealed
from internvl_edge.bundle.verified import VerifiedFiles
from internvl_edge.runtime.backends.machine import machine_key
from internvl_edge.runtime.backends.own_kernels import left_products, mapped_graphs
from internvl_edge.runtime.backends.products import AS_STORED, bundle_form

FOLDER = "prepared"
MANIFEST = "prepared.json"
#: How the files are written: packed weights beside the originals, as ONNX Runtime saves them. What
#: was prepared in another way is not used.
LAYOUT = "with originals"

#: What was written before there were seals, in parts.
OLDER_KEYS = ("source", "widest_bytes", "part_bytes", "products", "files")

PREPARE_AGAIN = "run 'internvl-edge prepare --overwrite' on the bundle"


def superseded(folder: Path) -> list[Path]:
    """What other versions of ONNX Runtime left beside `folder` for the same kind of CPU."""
    cpu = folder.name.split("-", 2)[2]
    others = folder.parent.glob(f"onnxruntime-*-{cpu}")
    return [other for other in others if other != folder and (other / MANIFEST).exists()]


def packed_graphs(
    bundle: Bundle, mapped: frozenset[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the files of each graph, by its name, whose weights ONNX Runtime packs here."""
    graphs = {VISION_GRAPH: VISION_FILES, LANGUAGE_GRAPH: LANGUAGE_FILES}
    left = set(graphs) - (mapped_graphs(bundle) if mapped is None else mapped)
    return {graph: files for graph, files in graphs.items() if graph in left}


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
    if not packed_graphs(bundle):
        return None
    if folder.is_dir():
        return (
            f"prepared weights in {named(folder)} were made from another export, by another version"
            " of internvl-edge, with a kernel that is not here, or for products that are not exact"
            f" on this CPU; {PREPARE_AGAIN}"
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
    if not packed_graphs(bundle):
        return None
    try:
        data = read_sealed(path, older=OLDER_KEYS)
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
    if set(entries) != set(data["source"]):
        raise BundleError(f"{named(path)} is damaged; {PREPARE_AGAIN}")
    return entries


def _is_origin(data: Mapping[str, Any], bundle: Bundle) -> bool:
    """Whether packed graphs are what this bundle needs; there may be more of them."""
    origin, source = _origin(bundle), data.get("source")
    if not isinstance(source, dict):
        return False
    hashes = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    told = {key: value for key, value in data.items() if key not in ("files", SEAL)}
    current = source.items() <= hashes.items()
    return current and set(origin["source"]) <= set(source) and told == origin | {"source": source}


def _origin(bundle: Bundle) -> dict[str, Any]:
    """Return what packed graphs depend on besides the machine.

    Hashes of the graphs that are packed and of their weights, how they are written, and, where it
    is not the stored one, the form of the integer products.
    """
    files = bundle.manifest.files
    packed = itertools.chain.from_iterable(packed_graphs(bundle).values())
    source = {name: files[name].sha256 for name in packed}
    left = left_products(bundle.manifest, mapped_graphs(bundle))
    form = bundle_form(bundle.manifest, left)
    forms = {} if form == AS_STORED else {"products": form.name}
    return {"source": source, "layout": LAYOUT, **forms}
