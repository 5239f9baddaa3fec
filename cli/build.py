"""The `build` command: a bundle's TensorRT engines for one GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from internvl_edge.bundle.errors import LimitError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.common import Commands

AUTO = "auto"
GIB = 1 << 30


def add_build(commands: Commands) -> None:
    """Add `build` to the command line."""
    build = commands.add_parser("build", help="TensorRT engines of a bundle, for one GPU")
    build.add_argument("bundle", metavar="BUNDLE")
    build.add_argument(
        "--target", default=AUTO, metavar="NAME", help="auto (the GPU here), orin-agx-64, ..."
    )
    build.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    build.add_argument("--max-context", type=int, help="most tokens of prompt and answer")
    build.add_argument(
        "--device-memory", type=float, metavar="GIB", help="of the GPU's memory, use no more"
    )
    build.add_argument(
        "--library",
        choices=("tensorrt", "tensorrt_rtx"),
        help="default: tensorrt where it is installed, else TensorRT for RTX",
    )
    build.add_argument("--overwrite", action="store_true", help="build again what is there")
    build.set_defaults(run=run_build)


def run_build(arguments: argparse.Namespace) -> int:
    """Build, say before what it takes and after how it computes; returns the exit status."""
    with extra_installed():
        from internvl_edge.export.tensorrt.engines import build_engines, render_layers
        from internvl_edge.export.tensorrt.profiles import (
            limits_of,
            plan_build,
            target_place,
            this_place,
        )
    from internvl_edge.bundle.manifest import open_bundle
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.tensorrt_library import Library

    device_memory = _bytes(arguments.device_memory)
    bundle = open_bundle(Path(arguments.bundle))
    limits = limits_of(bundle.spec, arguments.max_tiles, arguments.max_context)
    library = Library.open(arguments.library)
    library.check_dialect(bundle.manifest.dialect)
    if arguments.target == AUTO:
        place = this_place(Cuda.open(), library)
    else:
        place = target_place(arguments.target, library)
    memory = plan_build(bundle, limits, place, device_memory=device_memory)
    print(
        f"{place.name} (sm_{place.machine.sm}), {library.name} {library.version}: context"
        f" {limits.context}, passes of {limits.tokens} tokens, {limits.tiles} tiles"
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


def _bytes(gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib < 1 << 20:
        raise LimitError(f"--device-memory is {gib}, it must be a positive number of GiB")
    return int(gib * GIB)


def _shown() -> Callable[[str, int, int], None]:
    def show(phase: str, done: int, steps: int) -> None:
        print(f"\r\033[K{phase}: {done}/{steps}", end="", file=sys.stderr, flush=True)

    return show


def _silent(phase: str, done: int, steps: int) -> None:
    pass
