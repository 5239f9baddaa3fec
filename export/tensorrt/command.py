"""The `build` command: a bundle's TensorRT engines for one GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.manifest import open_bundle

AUTO = "auto"
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--target", default=AUTO, metavar="NAME", help="auto (the GPU here), orin-agx-64, ..."
    )
    parser.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    parser.add_argument("--max-context", type=int, help="most tokens of prompt and answer")
    parser.add_argument(
        "--max-sequences",
        type=int,
        default=1,
        metavar="N",
        help="most that are decoded together; each takes the memory of a whole context",
    )
    parser.add_argument(
        "--device-memory", type=_bytes, metavar="GIB", help="of the GPU's memory, use no more"
    )
    parser.add_argument(
        "--library",
        choices=("tensorrt", "tensorrt_rtx"),
        help="default: tensorrt where it is installed, else TensorRT for RTX",
    )
    parser.add_argument("--overwrite", action="store_true", help="build again what is there")


def run(arguments: argparse.Namespace) -> int:
    """Build, say before what it takes and after how it computes; returns the exit status."""
    from internvl_edge.export.tensorrt.engines import build_engines, render_layers
    from internvl_edge.export.tensorrt.profiles import (
        limits_of,
        plan_build,
        target_place,
        this_place,
    )
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.tensorrt_library import Library

    bundle = open_bundle(arguments.bundle)
    asked = arguments.max_tiles, arguments.max_context, arguments.max_sequences
    limits = limits_of(bundle.spec, *asked)
    library = Library.open(arguments.library)
    library.check_dialect(bundle.manifest.dialect)
    if arguments.target == AUTO:
        place = this_place(Cuda.open(), library)
    else:
        place = target_place(arguments.target, library)
    memory = plan_build(bundle, limits, place, device_memory=arguments.device_memory)
    print(
        f"{place.name} (sm_{place.machine.sm}), {library.name} {library.version}: context"
        f" {limits.context}, passes of {limits.tokens} tokens, {limits.sequences} sequences,"
        f" {limits.tiles} tiles"
    )
    print(memory.describe(), flush=True)
    engines = build_engines(
        bundle,
        place,
        limits,
        memory,
        library,
        overwrite=arguments.overwrite,
        progress=_shown() if sys.stderr.isatty() else _silent,
    )
    print(render_layers(engines))
    print(f"wrote {engines.path}")
    return 0


def _bytes(text: str) -> int:
    gib = float(text)
    if not 0 < gib < 1 << 20:
        raise UsageError(f"--device-memory is {gib}, it must be a positive number of GiB")
    return int(gib * GIB)


def _shown() -> Callable[[str, int, int], None]:
    def show(phase: str, done: int, steps: int) -> None:
        print(f"\r\033[K{phase}: {done}/{steps}", end="", file=sys.stderr, flush=True)

    return show


def _silent(phase: str, done: int, steps: int) -> None:
    pass
