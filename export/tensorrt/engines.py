"""Building a bundle's TensorRT engines for one GPU: shapes, memory, timings, publication.

    internvl-edge build BUNDLE [--target auto|orin-agx-64|...] [--max-tiles N] [--max-context N]
        [--max-sequences N]

One profile serves prefill and decoding, so that a plan holds its weights once. What is written
appears under its name when it is complete (`runtime/backends/plans.py` says where), or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx

from internvl_edge.bundle.contract import TILES
from internvl_edge.bundle.errors import OutputError
from internvl_edge.bundle.json_reader import read_object
from internvl_edge.bundle.manifest import Bundle, file_entry
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.graphs.dialects.engine_form import engine_form
from internvl_edge.export.output.destination import check_target
from internvl_edge.export.output.work import NEW, check_space, work_folder
from internvl_edge.export.tensorrt.builder import (
    Built,
    Progress,
    Request,
    ShapeRange,
    build_in_process,
)
from internvl_edge.export.tensorrt.built import as_built, products
from internvl_edge.export.tensorrt.gate import EngineShapes, profile_of
from internvl_edge.export.tensorrt.profiles import (
    MemoryNeed,
    Place,
    gib,
    limits_of,
    plan_build,
    this_place,
)
from internvl_edge.kernels.build import cache_directory
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import (
    FLAGS,
    FOLDER,
    LAYERS,
    MANIFEST,
    PLANS,
    EngineManifest,
    Engines,
    Limits,
    Machine,
    Wanted,
    built_engines,
    changes,
    engine_key,
    source_hashes,
)
from internvl_edge.runtime.backends.tensorrt_library import Library

#: A plan is little larger than its weights: kernels, tables.
PLAN_GROWTH = 1.05

Build = Callable[[Request, bytes, Progress], Built]


def build_engines(
    bundle: Bundle,
    place: Place,
    limits: Limits,
    memory: MemoryNeed,
    library: Library,
    *,
    overwrite: bool = False,
    progress: Progress = lambda phase, done, steps: None,
    build: Build = build_in_process,
) -> Engines:
    """Build both graphs of a bundle and publish them.

    Args:
        build: builds one graph; the tests' own does not take minutes.

    Raises:
        DeviceError: the library does not take the bundle's dialect.
        BusyError: another process builds them.
        OutputError: they exist, or the bundle is read-only.
        CapacityError: no space.
        EngineBuildError: a graph does not build.
    """
    library.check_dialect(bundle.manifest.dialect)
    source, precision = source_hashes(bundle), bundle.manifest.precision
    key = engine_key(place.machine, limits, precision, source, FLAGS)
    target = Path(os.path.realpath(bundle.path)) / FOLDER / key
    if not overwrite and _fits(bundle, key, place.machine):
        raise OutputError(f"{named(target)} exists", [Remedy.OVERWRITE])
    check_target(target, overwrite=True)
    check_space(target, int(PLAN_GROWTH * sum(memory.weights.values())), "the engines")
    with work_folder(target) as work:
        if not overwrite and _fits(bundle, key, place.machine):
            raise OutputError(f"{named(target)} was built meanwhile by another process")
        aside = work.fresh(NEW)
        report = {}
        for graph, plan in PLANS.items():
            form = engine_form(bundle.file(graph), limits.context)
            request = _request(bundle, graph, form, aside / plan, place, limits, memory, library)
            built = build(request, form, progress)
            report[graph] = _layer_report(form, built)
        (aside / LAYERS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        manifest = EngineManifest(
            machine=place.machine,
            limits=limits,
            dialect=bundle.manifest.dialect,
            precision=precision,
            flags=FLAGS,
            source=source,
            files={name: file_entry(aside / name) for name in (*PLANS.values(), LAYERS)},
        )
        (aside / MANIFEST).write_text(manifest.to_json() + "\n", encoding="utf-8")
        work.publish(aside)
    return Engines(target, manifest)


def build_for_machine(
    bundle: Bundle,
    cuda: Cuda,
    library: Library,
    wanted: Wanted,
    build: Build | None = None,
) -> Engines:
    """Build engines for the GPU that is here and what is wanted, else with the defaults:
    `InternVL.load`'s `build_engines`.

    Raises:
        UsageError: they cannot be for what is wanted.
        CapacityError: they do not fit the memory.
        EngineBuildError, OutputError: see `build_engines`.
    """
    place = this_place(cuda, library)
    limits = limits_of(bundle.spec, None, wanted.context, wanted.sequences or 1)
    memory = plan_build(bundle, limits, place)
    return build_engines(
        bundle, place, limits, memory, library, overwrite=True, build=build or build_in_process
    )


def timing_cache_path(library: Library, sm: int) -> Path | None:
    """Return the file of kernels' timings between builds; None: the library has none."""
    if not library.api.timing_cache:
        return None
    folder = cache_directory().with_name("timing")
    return folder / f"{library.name}-{library.version}-sm{sm}.cache"


def render_layers(engines: Engines) -> str:
    """How products are computed, by graph: counts by type, and what is slower than it could be."""
    report = read_object(engines.path / LAYERS)
    lines = []
    for graph, found in report.items():
        counts: dict[str, int] = {}
        for product in found["products"]:
            counts[product["types"]] = counts.get(product["types"], 0) + 1
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines.append(
            f"{graph}: {found['seconds']:.1f} s, at most {gib(found['peak_bytes'])} resident"
            f" (mapped weights included); {kinds}"
        )
        lines += [
            f"  {product['node']}: wider than in the graph ({product['types']})"
            for product in found["products"]
            if product["widened"]
        ]
    return "\n".join(lines)


def _request(
    bundle: Bundle,
    graph: str,
    form: bytes,
    plan: Path,
    place: Place,
    limits: Limits,
    memory: MemoryNeed,
    library: Library,
) -> Request:
    timings = timing_cache_path(library, place.machine.sm)
    return Request(
        library=library.name,
        graph=str(bundle.file(graph)),
        profile=_profile(form, limits),
        capability=place.machine.sm if place.machine.gpu is None else None,
        workspace=memory.workspace,
        flags=FLAGS,
        timing_cache=None if timings is None else str(timings),
        plan=str(plan),
    )


def _profile(form: bytes, limits: Limits) -> dict[str, ShapeRange]:
    """Ranges of the inputs. Kernels are chosen for the typical shape: for tiles a full pass."""
    ranges = profile_of(onnx.load_from_string(form).graph, EngineShapes(**asdict(limits)))
    if TILES in ranges:
        ranges[TILES] = replace(ranges[TILES], typical=ranges[TILES].largest)
    return ranges


def _layer_report(form: bytes, built: Built) -> dict[str, Any]:
    """Every matrix product: node, types as built, whether wider than asked for."""
    found = [as_built(item, built.layers) for item in products(onnx.load_from_string(form).graph)]
    return {
        "seconds": built.seconds,
        "peak_bytes": built.peak_bytes,
        "products": [
            {"node": item.product.node, "types": item.types, "widened": item.widened}
            for item in found
        ],
    }


def _fits(bundle: Bundle, key: str, machine: Machine) -> bool:
    return any(
        found.path.name == key and not changes(found.manifest, bundle, machine)
        for found in built_engines(bundle)
    )
