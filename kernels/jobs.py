"""What a kernel call is told: checked requests, and the C structures of the .cuh files.

Shared by the CPU library, the CUDA build and the NumPy reference, so that all three check alike.
Errors are `ValueError` and `TypeError` that say what was got, what the limit is, what to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMATS = {"rgb": 0, "bgr": 1, "rgba": 2, "nv12": 3}
MATRICES = {"bt601": 0, "bt709": 1}
LAYOUTS = {"tiles": 0, "nchw": 1, "patches": 2}
TYPES = {"uint8": 0, "float32": 1, "float16": 2, "int8": 3, "uint64": 4}
SHUFFLES = {"v2": 0, "v1": 1}

#: Sides and widths are int32 in the kernels, with room for a factor of 4 bytes a pixel.
MAX_SIDE = 2**29


class ImageStruct(ctypes.Structure):
    """`ive::Image`."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("chroma", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("chroma_stride", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("matrix", ctypes.c_int32),
    )


class AxisStruct(ctypes.Structure):
    """`ive::Axis`."""

    _fields_ = (
        ("low", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("taps", ctypes.c_int32),
        ("size", ctypes.c_int32),
    )


class TileJob(ctypes.Structure):
    """`ive::TileJob`."""

    _fields_ = (
        ("image", ImageStruct),
        ("across", AxisStruct * 2),
        ("down", AxisStruct * 2),
        ("out", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("columns", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("side", ctypes.c_int32),
        ("patch", ctypes.c_int32),
        ("thumbnail", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class ShuffleJob(ctypes.Structure):
    """`ive::ShuffleJob`."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("tiles", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("transposed", ctypes.c_int32),
        ("in_type", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class SelectJob(ctypes.Structure):
    """`ive::SelectJob`."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("size", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class LaunchShape(ctypes.Structure):
    """`ive::LaunchShape`."""

    _fields_ = (
        ("x", ctypes.c_int64),
        ("y", ctypes.c_int64),
        ("z", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


@dataclass(frozen=True)
class TilePlan:
    """A tiling to be made: the grid, the output's layout and element type."""

    columns: int
    rows: int
    tile_size: int
    patch_size: int
    thumbnail: bool
    layout: str
    dtype: np.dtype[Any]
    short_weights: bool

    @classmethod
    def of(
        cls,
        columns: int,
        rows: int,
        tile_size: int,
        patch_size: int,
        thumbnail: bool,
        layout: str,
        dtype: Any,
        short_weights: bool = False,
    ) -> TilePlan:
        """Check a request; `dtype` None is uint8 for layout "tiles", else float32."""
        for name, value in (("columns", columns), ("rows", rows), ("tile_size", tile_size)):
            if not 1 <= value <= MAX_SIDE:
                raise ValueError(f"{name} is {value}, it must be in 1..{MAX_SIDE}")
        if max(columns, rows) * tile_size > MAX_SIDE:
            raise ValueError(
                f"a grid of {columns} x {rows} tiles of {tile_size} pixels is wider than"
                f" {MAX_SIDE}; use fewer tiles"
            )
        choose("layout", layout, LAYOUTS)
        wanted = np.dtype(dtype if dtype is not None else _default_dtype(layout))
        allowed = ("uint8",) if layout == "tiles" else ("float32", "float16")
        if wanted.name not in allowed:
            raise TypeError(f"layout {layout!r:.200} is {' or '.join(allowed)}, not {wanted.name}")
        if layout == "patches" and (patch_size < 1 or tile_size % patch_size):
            raise ValueError(
                f"tile_size {tile_size} is not a multiple of patch_size {patch_size};"
                " pass the model's own patch_size"
            )
        both = bool(thumbnail) and columns * rows > 1
        patch = max(patch_size, 1)
        return cls(columns, rows, tile_size, patch, both, layout, wanted, bool(short_weights))

    @property
    def tiles(self) -> int:
        return self.columns * self.rows + int(self.thumbnail)

    @property
    def shape(self) -> tuple[int, ...]:
        side = self.tile_size
        if self.layout == "tiles":
            return (self.tiles, side, side, 3)
        if self.layout == "nchw":
            return (self.tiles, 3, side, side)
        return (self.tiles, (side // self.patch_size) ** 2, 3 * self.patch_size**2)

    def fill(self, job: TileJob) -> None:
        job.columns, job.rows, job.side = self.columns, self.rows, self.tile_size
        job.patch, job.thumbnail = self.patch_size, int(self.thumbnail)
        job.layout, job.type = LAYOUTS[self.layout], TYPES[self.dtype.name]


@dataclass(frozen=True)
class ShufflePlan:
    """Shape and type of a pixel shuffle, `(tiles, 1 + rows * columns, channels)` in."""

    tiles: int
    rows: int
    columns: int
    channels: int
    version: str
    in_dtype: np.dtype[Any]
    dtype: np.dtype[Any]
    scale: float | None
    eps: float

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        in_dtype: Any,
        grid: tuple[int, int] | None,
        version: str,
        dtype: Any,
        scale: float | None,
        eps: float,
    ) -> ShufflePlan:
        """Check a request; `grid` None is a square of patches, `dtype` None the input's."""
        given = np.dtype(in_dtype)
        wanted = np.dtype(dtype if dtype is not None else ("int8" if scale is not None else given))
        if given.name not in ("float32", "float16"):
            raise TypeError(f"features are float32 or float16, not {given.name}")
        if wanted.name not in ("float32", "float16", "int8"):
            raise TypeError(f"the output is float32, float16 or int8, not {wanted.name}")
        if (wanted.name == "int8") != (scale is not None):
            raise ValueError(f"int8 output needs a scale and only it takes one, got {scale}")
        if scale is not None and not (np.isfinite(scale) and np.float32(scale) > 0):
            raise ValueError(f"scale is {scale}, it must be positive and finite")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"features are (tiles, 1 + rows * columns, channels), not {shape}")
        choose("version", version, SHUFFLES)
        tiles, sequence, channels = shape
        side = round((sequence - 1) ** 0.5)
        rows, columns = grid if grid is not None else (side, side)
        if rows * columns != sequence - 1 or rows < 2 or rows % 2 or columns % 2:
            raise ValueError(
                f"{sequence} tokens are not a class token and {rows} x {columns} patches of even"
                " sides; pass grid=(rows, columns) of the patches"
            )
        return cls(tiles, rows, columns, channels, version, given, wanted, scale, eps)

    @property
    def width(self) -> int:
        return 4 * self.channels

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.tiles, self.rows * self.columns // 4, self.width)

    def fill(self, job: ShuffleJob) -> None:
        job.tiles, job.rows, job.columns = self.tiles, self.rows, self.columns
        job.channels, job.transposed = self.channels, SHUFFLES[self.version]
        job.in_type, job.out_type = TYPES[self.in_dtype.name], TYPES[self.dtype.name]
        job.eps, job.scale = self.eps, self.scale or 1.0


def choose(name: str, value: str, options: Mapping[str, int]) -> int:
    """The number of an option, or a ValueError that lists them."""
    if value not in options:
        raise ValueError(f"{name} is {value!r:.200}, it must be one of {', '.join(options)}")
    return options[value]


def check_norm(plan: ShufflePlan, weight: Any, bias: Any) -> None:
    """LayerNorm's weight and bias come together, `(4 * channels,)` each."""
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias go together: pass both for LayerNorm, none without")
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and tuple(array.shape) != (plan.width,):
            raise ValueError(f"{name} has shape {array.shape}, expected ({plan.width},)")


def check_out(out: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """A caller's output array must be what the kernel will write."""
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {out.dtype} {out.shape}, expected {dtype} {shape}")
    if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise ValueError("out must be C-contiguous, aligned and writable; pass np.empty(...)")


def _default_dtype(layout: str) -> str:
    return "uint8" if layout == "tiles" else "float32"
