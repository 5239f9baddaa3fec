"""Runs every entry point of a sanitized build over awkward shapes; prints `clean` at the end.

Started by test_indexing.py in a process of its own: python sanitized.py LIBRARY [overrun]
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from internvl_edge.kernels import cuda, ops
from internvl_edge.kernels.images import planes_of
from internvl_edge.kernels.jobs import TYPES, SelectJob, ShuffleJob, ShufflePlan, TilePlan


def exact(shape: tuple[int, ...], dtype: Any = np.uint8) -> Any:
    """An array that ends where its heap block ends: one byte further is an error."""
    rng = np.random.default_rng(sum(shape))
    return np.array(rng.integers(0, 256, shape).astype(dtype), copy=True, order="C")


def images(width: int, height: int) -> list[tuple[Any, str]]:
    chroma = ((height + 1) // 2, (width + 1) // 2 * 2)
    return [
        (exact((height, width, 3)), "rgb"),
        (exact((height, width, 3)), "bgr"),
        (exact((height, width, 4)), "rgba"),
        ((exact((height, width)), exact(chroma)), "nv12"),
    ]


def tile_everything(library: ctypes.CDLL) -> None:
    sizes = ((1, 1), (5, 3), (17, 64), (64, 65), (130, 7), (1, 300), (301, 200))
    for (width, height), side in ((size, side) for size in sizes for side in (4, 28, 60)):
        for image, name in images(width, height):
            for layout in ("tiles", "nchw", "patches"):
                options: dict[str, Any] = {"layout": layout, "pixel_format": name}
                ops.tile(
                    image, columns=2, rows=1, tile_size=side, patch_size=2, threads=3, **options
                )
            elements(library, image, name, height, side)


def elements(library: ctypes.CDLL, image: Any, name: str, height: int, side: int) -> None:
    plan = TilePlan.of(1, 2, side, 2, True, "patches", "float32")
    out = np.empty(plan.shape, plan.dtype)
    job, _alive = ops.tile_job(planes_of(image, name), plan, out)
    scratch = np.empty(cuda.scratch_bytes(height, plan), np.uint8)
    job.scratch = scratch.ctypes.data
    library.ive_cpu_tile_elements(ctypes.byref(job))


def blocks(library: ctypes.CDLL, x: Any, grid: tuple[int, int], norm: dict[str, Any]) -> None:
    """The CUDA kernel's blocks, for every type of output."""
    for dtype, scale in (("float32", None), ("float16", None), ("int8", 0.1)):
        plan = ShufflePlan.of(x.shape, x.dtype, grid, "v1", dtype, scale, 1e-5)
        job, out = ShuffleJob(), np.empty(plan.shape, plan.dtype)
        plan.fill(job)
        job.input, job.out = x.ctypes.data, out.ctypes.data
        for name, array in norm.items():
            setattr(job, name, array.ctypes.data)
        assert library.ive_cpu_pixel_shuffle_blocks(ctypes.byref(job)) == 0


def shuffle_everything(library: ctypes.CDLL) -> None:
    for rows, columns, channels in ((2, 2, 1), (4, 6, 7), (2, 8, 129), (2, 2, 64)):
        norm = {
            "weight": np.ones(4 * channels, np.float32),
            "bias": np.zeros(4 * channels, np.float32),
        }
        for dtype in ("float32", "float16"):
            x = exact((3, 1 + rows * columns, channels), dtype)
            for given in ({}, norm):
                blocks(library, x, (rows, columns), given)
            for version in ("v1", "v2"):
                options: dict[str, Any] = {"grid": (rows, columns), "version": version}
                for out in ("float32", "float16"):
                    ops.pixel_shuffle(x, dtype=out, **options)
                    ops.pixel_shuffle(x, dtype=out, threads=2, **options, **norm)
                ops.pixel_shuffle(x, scale=0.1, threads=2, **options, **norm)
                extremes = np.array([np.nan, np.inf, -np.inf, 6e4], dtype)
                ops.pixel_shuffle(np.resize(extremes, x.shape), scale=1e-3, **options)


def select_everything(library: ctypes.CDLL) -> None:
    count = 64
    for size in (1, 63, 1023, 1024, 1025, 92553):
        for dtype in ("float32", "float16"):
            logits = np.resize(np.array([1, np.nan, np.inf, -np.inf], dtype), size)
            given, first = logits, logits.argmax()
            for kept in cuda.select_levels(size, count):
                out = np.empty(kept, np.uint64)
                addresses = given.ctypes.data, out.ctypes.data
                job = SelectJob(*addresses, len(given), count, TYPES[given.dtype.name])
                assert library.ive_cpu_select_blocks(ctypes.byref(job)) == 0
                given = out
            assert cuda.read_candidates(given)[0][0] == first


def main(path: str, *mode: str) -> None:
    """Use the library at `path`; mode "overrun" hands it an output that is too small."""
    library = ops.load(path)
    ops.cpu_kernels = lambda: library  # type: ignore[assignment]
    if mode == ("overrun",):
        plan = TilePlan.of(2, 2, 28, 14, True, "tiles", None)
        out = np.empty(plan.shape, np.uint8)
        job, _alive = ops.tile_job(planes_of(exact((9, 9, 3))), plan, out)
        small = np.empty(100, np.uint8)
        job.out = small.ctypes.data
        library.ive_cpu_tile(ctypes.byref(job), 1)
    tile_everything(library)
    shuffle_everything(library)
    select_everything(library)
    print("clean")


if __name__ == "__main__":
    main(*sys.argv[1:])
