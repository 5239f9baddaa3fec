"""Export at true size: a released member of the family, its weights drawn instead of read.

    internvl-edge bench scale internvl-chat-v1-5 -o B --vision int8 --language int4 --kv int8

Says before it starts what the bundle will take, exports as `internvl-edge export --naive` does, and
reports wall time, peak memory and the bytes written beside the computed ones. Integers are rounded
to nearest: nothing is gained by searching for what suits random weights. The time of that search,
as other exports make it, is not measured.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import (
    CachePrecision,
    LanguagePrecision,
    VisionPrecision,
    default_cache,
)
from internvl_edge.bundle.errors import CheckpointError, UsageError
from internvl_edge.bundle.manifest import read_manifest
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.calib_data.generator import generate
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.export.progress import progress_bar
from internvl_edge.export.sizes import bundle_bytes

#: Pictures of one tile each that the activations' ranges are taken from.
PICTURES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help="such as internvl-chat-v1-5")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="BUNDLE")
    parser.add_argument("--vision", choices=get_args(VisionPrecision), default="fp32")
    parser.add_argument("--language", choices=get_args(LanguagePrecision), default="fp32")
    parser.add_argument("--kv", choices=get_args(CachePrecision), help="default: as computed")
    parser.add_argument("--layers", type=int, metavar="N", help="keep N of each tower's")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")


def run(arguments: argparse.Namespace) -> int:
    """Export, measure, print; returns the exit status.

    Raises:
        CheckpointError: no such model.
        UsageError: more layers than it has, or an output that cannot be written.
        ExportError: the bundle cannot be written.
    """
    name, output = arguments.model, arguments.output
    vision, language, kv = arguments.vision, arguments.language, arguments.kv
    check_writable(arguments.json)
    spec = synthetic_spec(name, arguments.layers)
    recipe = Recipe(vision, language, kv or default_cache(language), QuantOptions(naive=True))
    computed = sum(bundle_bytes(spec, recipe).values())
    print(f"{name}: the bundle will take {computed / 1e9:.2f} GB", flush=True)
    started = time.perf_counter()
    with (
        scratch_folder() as folder,
        progress_bar("calibrate", unit="layer") as unit_progress,
        progress_bar("export") as progress,
    ):
        export_bundle(
            SyntheticWeights(spec),
            output,
            vision=vision,
            language=language,
            kv=kv,
            options=recipe.options,
            calibration=write_pictures(folder, spec.vision.tile_size, PICTURES),
            sensitivity=False,
            overwrite=arguments.overwrite,
            progress=progress,
            calibration_progress=unit_progress,
        )
    manifest = read_manifest(output)
    written = sum(entry.bytes for entry in manifest.files.values())
    seconds = time.perf_counter() - started
    # ru_maxrss is in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "format": "internvl-edge synthetic export",
        "version": 1,
        "model": name,
        "layers": [spec.vision.layers_run, spec.language.num_hidden_layers],
        "precision": manifest.precision,
        "options": asdict(recipe.options),
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "computed_bytes": computed,
        "written_bytes": written,
        "machine": describe_machine(0),
    }
    print(
        f"{seconds:.0f} s, peak memory {peak / 2**30:.2f} GiB,"
        f" {written / 1e9:.3f} GB written, {100 * (written / computed - 1):+.2f}% of the computed"
    )
    if arguments.json is not None:
        write_result(result, arguments.json)
    return 0


def synthetic_spec(name: str, layers: int | None) -> ModelSpec:
    """A released member's spec, perhaps cut to its first layers."""
    if name not in CONFIGS:
        raise CheckpointError(f"unknown model {quoted(name)}; known: {', '.join(CONFIGS)}")
    spec = parse_config(CONFIGS[name])
    if layers is None:
        return spec
    most = min(spec.vision.num_hidden_layers, spec.language.num_hidden_layers)
    if not 1 <= layers <= most:
        raise UsageError(f"--layers is {layers}, {name} has 1..{most} of each kind")
    return replace(
        spec,
        vision=replace(spec.vision, num_hidden_layers=layers),
        language=replace(spec.language, num_hidden_layers=layers),
    )


def write_pictures(folder: Path, side: int, count: int) -> Path:
    """Write so many pictures of one tile each into a folder, for a calibration."""
    for number, item in enumerate(generate(count, seed=1)):
        item.image.resize((side, side)).save(folder / f"{number}.png")
    return folder
