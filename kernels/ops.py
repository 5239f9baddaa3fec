"""The kernels on the CPU: checked arguments, the C++ library where it can be built, else NumPy.

Nothing is compiled or loaded before the first call. Results are the same either way, bit for bit
in the tiles; without a compiler they take longer, and one line in the log says so.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from internvl_edge.kernels import reference
from internvl_edge.kernels.build import BuildError, cpu_library
from internvl_edge.kernels.images import Planes, planes_of
from internvl_edge.kernels.jobs import (
    AxisStruct,
    ShuffleJob,
    ShufflePlan,
    TileJob,
    TilePlan,
    check_norm,
    check_out,
)
from internvl_edge.kernels.weights import Weights, axis_weights

OUT_OF_MEMORY = 1

_log = logging.getLogger("internvl_edge")


def tile(
    image: Any,
    *,
    columns: int,
    rows: int,
    tile_size: int = 448,
    patch_size: int = 14,
    thumbnail: bool = True,
    layout: str = "tiles",
    dtype: DTypeLike | None = None,
    pixel_format: str = "rgb",
    matrix: str = "bt601",
    short_weights: bool = False,
    out: NDArray[Any] | None = None,
    threads: int | None = None,
) -> NDArray[Any]:
    """Resize an image to `columns` x `rows` tiles, cut it, and normalise if asked to.

    Antialiased bicubic, bit-equal to Pillow <= 12, or to torchvision. A thumbnail of the whole
    image comes last when `thumbnail` is set and there is more than one tile.

    Args:
        image: uint8 pixels; see `images.planes_of` for formats. Any row stride.
        columns, rows: the grid, at least 1 each.
        tile_size: side S of a tile in pixels.
        patch_size: side of a patch; it must divide `tile_size` for layout "patches".
        layout: "tiles": uint8 `(tiles, S, S, 3)` in RGB; "nchw": `(tiles, 3, S, S)` as
            (pixel / 255 - mean) / std; "patches": `(tiles, (S / patch)^2, 3 * patch^2)`, the same
            values as rows of the patch product, each in channel, row, column order.
        dtype: float32 (default) or float16 of "nchw" and "patches"; float16 is float32 rounded.
        pixel_format, matrix: "rgb", "bgr", "rgba", or "nv12" with "bt601" or "bt709".
        short_weights: resize as torchvision does, whose weights have 16 bits.
        out: array to write to, of exactly the result's shape and dtype; it must not overlap.
        threads: CPU threads; None is one per available core.

    Returns:
        `out`, or a new array.

    Raises:
        ValueError, TypeError: an argument is not as above.
        MemoryError: the working buffers (megabytes a thread) could not be had.
    """
    plan = TilePlan.of(
        columns, rows, tile_size, patch_size, thumbnail, layout, dtype, short_weights
    )
    planes = planes_of(image, pixel_format, matrix)
    workers = _threads(threads)
    result = _output(out, plan.shape, plan.dtype)
    library = cpu_kernels()
    if library is None:
        reference.tile(planes, plan, result)
        return result
    job, _alive = tile_job(planes, plan, result)
    _check(library.ive_cpu_tile(ctypes.byref(job), workers))
    return result


def pixel_shuffle(
    features: NDArray[Any],
    *,
    grid: tuple[int, int] | None = None,
    version: str = "v2",
    weight: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
    scale: float | None = None,
    out: NDArray[Any] | None = None,
    threads: int | None = None,
) -> NDArray[Any]:
    """Drop the class token, merge 2 x 2 patches, and LayerNorm over the merged channels.

    Args:
        features: `(tiles, 1 + rows * columns, C)`, float32 or float16.
        grid: (rows, columns) of the patches; None is a square.
        version: "v2", or "v1", which lays the groups out column by column.
        weight, bias: of the LayerNorm, `(4C,)` each, used as float32; None shuffles only.
        dtype: float32, float16 or int8; None is the input's, or int8 with a scale.
        scale: of int8 output: stored = round half to even of value / scale, saturated.
        out: array to write to; threads: CPU threads; see `tile`.

    Returns:
        `(tiles, rows/2 * columns/2, 4C)`.

    Raises:
        ValueError, TypeError: an argument is not as above.
        MemoryError: the working buffers could not be had.
    """
    plan = ShufflePlan.of(features.shape, features.dtype, grid, version, dtype, scale, eps)
    check_norm(plan, weight, bias)
    workers = _threads(threads)
    source = np.ascontiguousarray(features)
    norm = [None if a is None else np.ascontiguousarray(a, np.float32) for a in (weight, bias)]
    result = _output(out, plan.shape, plan.dtype)
    library = cpu_kernels()
    if library is None:
        reference.pixel_shuffle(source, plan, norm[0], norm[1], result)
        return result
    job = ShuffleJob()
    plan.fill(job)
    job.input, job.out = source.ctypes.data, result.ctypes.data
    job.weight, job.bias = (None if a is None else a.ctypes.data for a in norm)
    _check(library.ive_cpu_pixel_shuffle(ctypes.byref(job), workers))
    return result


@lru_cache(maxsize=1)
def cpu_kernels() -> ctypes.CDLL | None:
    """The CPU library, built and loaded once a process; None (and one warning) without it."""
    try:
        return load(str(cpu_library()))
    except (BuildError, OSError) as error:
        first = str(error).splitlines()[0]
        _log.warning("CPU kernels not built: %s; the fallback is exact but slower", first)
        return None


def load(path: str) -> ctypes.CDLL:
    """Load a build of host.cpp and declare its entry points."""
    library = ctypes.CDLL(path)
    for name, arguments in _ENTRY_POINTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int32
    return library


def tile_job(
    planes: Planes, plan: TilePlan, out: NDArray[Any]
) -> tuple[TileJob, list[dict[str, Weights]]]:
    """The job of one call, and the weights that must outlive it."""
    job = TileJob()
    plan.fill(job)
    job.image, job.out = planes.struct(), out.ctypes.data
    axes = job_axes(planes.width, planes.height, plan)
    for index, axis in enumerate(axes):
        job.across[index] = _axis_struct(axis["across"])
        job.down[index] = _axis_struct(axis["down"])
    return job, axes


def job_axes(width: int, height: int, plan: TilePlan) -> list[dict[str, Weights]]:
    """Weights of the grid and, where there is one, of the thumbnail."""
    side, short = plan.tile_size, plan.short_weights
    grids = [(plan.columns, plan.rows), (1, 1)] if plan.thumbnail else [(plan.columns, plan.rows)]
    return [
        {
            "across": axis_weights(width, columns * side, short),
            "down": axis_weights(height, rows * side, short),
        }
        for columns, rows in grids
    ]


def _axis_struct(axis: Weights) -> AxisStruct:
    return AxisStruct(
        axis.low.ctypes.data,
        axis.count.ctypes.data,
        axis.weights.ctypes.data,
        axis.taps,
        axis.size,
    )


def _output(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if out is None:
        return np.empty(shape, dtype)
    check_out(out, shape, dtype)
    return out


def _threads(threads: int | None) -> int:
    if threads is None:
        return available_cores()
    if threads < 1:
        raise ValueError(f"threads is {threads}, it must be at least 1")
    return threads


def available_cores() -> int:
    """Cores this process may run on; fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check(status: int) -> None:
    if status == OUT_OF_MEMORY:
        raise MemoryError("no memory for the kernels' working buffers; use fewer threads")
    if status:
        raise RuntimeError(f"the CPU kernel refused its job (status {status})")


_POINTER = ctypes.c_void_p
_ENTRY_POINTS: dict[str, list[Any]] = {
    "ive_cpu_tile": [_POINTER, ctypes.c_int32],
    "ive_cpu_pixel_shuffle": [_POINTER, ctypes.c_int32],
    "ive_cpu_tile_elements": [_POINTER],
    "ive_cpu_pixel_shuffle_blocks": [_POINTER],
    "ive_cpu_select_blocks": [_POINTER],
}
