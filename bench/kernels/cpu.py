"""Each kernel beside its reference: correctness first, then time, bytes and percent of bandwidth.

    internvl-edge bench kernels [--threads N] [--json]      # --device cuda: kernels_cuda.py

The reference of tiling is what InternVL's own code does: Pillow's resize and crop of a decoded
image, then NumPy's normalisation tile by tile. Kernel and reference run alternately, so that a
busy machine slows both, and medians are compared. Two times are given for a kernel: `whole` from
the same Pillow image to a new array, as the reference; `kernel` from an array to an existing one,
whose bytes (input read once, output written once) give the percentage of the copy bandwidth.
Products of weights in blocks, experts and attention stand beside ONNX Runtime's: see
`bench.kernels.blocks`, `experts` and `attention`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bench.common.ceilings import copy_bandwidth
from internvl_edge.bench.kernels import attention as attention_bench
from internvl_edge.bench.kernels import experts as experts_bench
from internvl_edge.bench.kernels.attention import AttentionRow
from internvl_edge.bench.kernels.blocks import (
    SHAPE,
    TOLERANCE,
    BlockRow,
    measure_blocks,
    render_blocks,
)
from internvl_edge.kernels import ops, reference
from internvl_edge.kernels.jobs import ShufflePlan
from internvl_edge.runtime.backends.attention import ATTENTION
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.own_kernel import own_kernel
from internvl_edge.runtime.images.preprocess import resize

SIDE = 448
#: (width, height), grid: a 4K photo as the 40 tiles it may take at most, a VGA one as 12.
PICTURES = (((3840, 2160), (8, 5)), ((640, 480), (4, 3)))
#: InternViT-6B's output for 13 tiles.
FEATURES = (13, 1025, 3200)
INT8_SCALE = 0.03
#: Below this share of the copy bandwidth a kernel waits for arithmetic rather than for memory.
MEMORY_BOUND_PERCENT = 60

Task = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One kernel on one input; times are medians in milliseconds."""

    name: str
    threads: int
    reference_ms: float
    whole_ms: float
    kernel_ms: float
    speedup: float
    megabytes: float
    gigabytes_per_s: float
    percent_of_copy: float

    @property
    def limited_by(self) -> str:
        return "memory" if self.percent_of_copy >= MEMORY_BOUND_PERCENT else "arithmetic"


@dataclass(frozen=True)
class Case:
    """A kernel and its reference over one input. `whole` and `kernel` take a thread count."""

    name: str
    reference: Task
    whole: Callable[[int], Any]
    kernel: Callable[[int], Any]
    nbytes: int
    check: Task


class WrongResultError(Exception):
    """A kernel's result is not its reference's; nothing was timed."""


def run_kernels(*, threads: int | None = None, runs: int = 7, as_json: bool = False) -> int:
    """Check and time every kernel with one thread and with `threads`; print; return 0 or 1."""
    many = threads or ops.available_cores()
    counts = sorted({1, many})
    copy = {count: copy_bandwidth(count) for count in counts}
    rows = []
    try:
        for case in (*map(_tiling, PICTURES), _shuffle("float16"), _shuffle("int8")):
            case.check()
            rows += _measure(case, counts, copy, runs)
        blocks, attention = _measure_blocks(many, runs), _measure_attention(many, runs)
        experts = _measure_experts(many, runs)
    except WrongResultError as error:
        print(f"WRONG: {error}")
        return 1
    report = {
        "machine": _machine(),
        "copy_gigabytes_per_s": {str(n): round(rate / 1e9, 1) for n, rate in copy.items()},
        "runs": runs,
        "rows": [asdict(row) | {"limited_by": row.limited_by} for row in rows],
        "blocks": {
            "kernel": str(own_kernel(BLOCKS)),
            "shape": SHAPE,
            "rows": list(map(asdict, blocks)),
        },
        "experts": {"shape": experts_bench.SHAPE, "rows": list(map(asdict, experts))},
        "attention": {
            "kernel": str(own_kernel(ATTENTION)),
            "shape": attention_bench.SHAPE,
            "rows": list(map(asdict, attention)),
        },
    }
    lines = [
        _render(report, rows),
        *render_blocks(own_kernel(BLOCKS), blocks, many),
        *experts_bench.render_experts(experts, many),
        *attention_bench.render_attention(own_kernel(ATTENTION), attention, many),
    ]
    print(json.dumps(report, indent=2) if as_json else "\n".join(lines))
    return 0


def _measure_attention(threads: int, runs: int) -> list[AttentionRow]:
    """Measure attention where our kernel runs."""
    if own_kernel(ATTENTION).library is None:
        return []
    rows = attention_bench.measure_attention(own_kernel(ATTENTION), threads, runs)
    for row in rows:
        if row.difference > attention_bench.TOLERANCE:
            raise WrongResultError(
                f"attention, {row.cache}, {row.rows} rows: differs from GroupQueryAttention by"
                f" {row.difference:.1e} of the largest result"
            )
    return rows


def _measure_blocks(threads: int, runs: int) -> list[BlockRow]:
    """Measure the products of weights in blocks where our kernel runs."""
    if own_kernel(BLOCKS).library is None:
        return []
    rows = measure_blocks(own_kernel(BLOCKS), threads, runs)
    for row in rows:
        if not row.difference < TOLERANCE:
            raise WrongResultError(
                f"INT{row.bits} product, {row.rows} rows: differs from MatMulNBits by"
                f" {row.difference:.1e}"
            )
    return rows


def _measure_experts(threads: int, runs: int) -> list[experts_bench.ExpertsRow]:
    """Measure a layer of experts where our kernel runs."""
    if own_kernel(BLOCKS).library is None:
        return []
    rows = experts_bench.measure_experts(own_kernel(BLOCKS), threads, runs)
    for row in rows:
        if not row.difference < experts_bench.TOLERANCE:
            raise WrongResultError(
                f"experts, {row.rows} rows: differ from QMoE by {row.difference:.1e} of the result"
            )
    return rows


def _measure(case: Case, counts: list[int], copy: dict[int, float], runs: int) -> list[Row]:
    tasks: dict[tuple[str, int], Task] = {("reference", 0): case.reference}
    for count in counts:
        tasks["whole", count] = partial(case.whole, count)
        tasks["kernel", count] = partial(case.kernel, count)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in tasks}
    for _ in range(runs):
        for key, task in tasks.items():
            started = time.perf_counter()
            result = task()
            times[key].append(time.perf_counter() - started)
            del result
    median = {key: statistics.median(values) for key, values in times.items()}
    return [_row(case, count, median, copy[count]) for count in counts]


def _row(case: Case, count: int, median: dict[tuple[str, int], float], copy: float) -> Row:
    before, whole, kernel = (
        median["reference", 0],
        median["whole", count],
        median["kernel", count],
    )
    return Row(
        name=case.name,
        threads=count,
        reference_ms=round(before * 1e3, 2),
        whole_ms=round(whole * 1e3, 2),
        kernel_ms=round(kernel * 1e3, 2),
        speedup=round(before / whole, 1),
        megabytes=round(case.nbytes / 1e6, 1),
        gigabytes_per_s=round(case.nbytes / kernel / 1e9, 1),
        percent_of_copy=round(100 * case.nbytes / kernel / copy, 1),
    )


def _tiling(picture: tuple[tuple[int, int], tuple[int, int]]) -> Case:
    (width, height), (columns, rows) = picture
    image = Image.fromarray(photo(width, height))
    pixels = np.asarray(image)
    grid: dict[str, Any] = {"columns": columns, "rows": rows, "layout": "nchw"}
    out = ops.tile(pixels, **grid)
    name = f"tiling {width}x{height} -> {columns * rows}+1 tiles, float32 NCHW"

    def check() -> None:
        expected = _reference_tiles(image, columns, rows)
        if not np.array_equal(ops.tile(pixels, **grid), expected):
            raise WrongResultError(f"{name}: differs from Pillow and NumPy")

    return Case(
        name=name,
        reference=lambda: _reference_tiles(image, columns, rows),
        whole=lambda threads: ops.tile(np.asarray(image), threads=threads, **grid),
        kernel=lambda threads: ops.tile(pixels, threads=threads, out=out, **grid),
        nbytes=pixels.nbytes + out.nbytes,
        check=check,
    )


def _reference_tiles(image: Image.Image, columns: int, rows: int) -> NDArray[np.float32]:
    """Pillow's resize and crop, NumPy's normalisation: `(columns * rows + 1, 3, S, S)`."""
    whole = resize(image, columns * SIDE, rows * SIDE)
    tiles = [
        whole.crop((x * SIDE, y * SIDE, (x + 1) * SIDE, (y + 1) * SIDE))
        for y in range(rows)
        for x in range(columns)
    ]
    tiles.append(resize(image, SIDE, SIDE))
    return np.stack([reference.normalise(np.asarray(tile)) for tile in tiles])


def _shuffle(dtype: str) -> Case:
    rng = np.random.default_rng(0)
    features = rng.standard_normal(FEATURES, np.float32).astype(np.float16)
    norm: dict[str, Any] = {
        "weight": rng.standard_normal(4 * FEATURES[2], np.float32),
        "bias": rng.standard_normal(4 * FEATURES[2], np.float32),
    }
    scale = INT8_SCALE if dtype == "int8" else None
    options: dict[str, Any] = norm | {"dtype": dtype, "scale": scale}
    plan = ShufflePlan.of(features.shape, features.dtype, None, "v2", dtype, scale, 1e-5)
    out = ops.pixel_shuffle(features, **options)
    name = f"pixel shuffle + LayerNorm {FEATURES[0]}x1024x{FEATURES[2]} float16 -> {dtype}"

    def by_numpy() -> NDArray[Any]:
        result = np.empty(plan.shape, plan.dtype)
        reference.pixel_shuffle(features, plan, norm["weight"], norm["bias"], result)
        return result

    def check() -> None:
        got = ops.pixel_shuffle(features, **options).astype(np.float32)
        expected = by_numpy().astype(np.float32)
        gap = np.abs(got - expected)
        # int8: one step. float16: two float32 results 1e-6 apart may round to neighbours.
        near = np.maximum(np.abs(got), np.abs(expected)).astype(np.float16)
        limit = 1.0 if dtype == "int8" else np.spacing(near).astype(np.float32) + 1e-5
        if (gap > limit).any() or np.mean(gap > 0) > 1e-2:
            raise WrongResultError(f"{name}: differs from NumPy by up to {gap.max()}")

    return Case(
        name=name,
        reference=by_numpy,
        whole=lambda threads: ops.pixel_shuffle(features, threads=threads, **options),
        kernel=lambda threads: ops.pixel_shuffle(features, threads=threads, out=out, **options),
        nbytes=features[:, 1:].nbytes + out.nbytes,
        check=check,
    )


def photo(width: int, height: int) -> NDArray[np.uint8]:
    """A picture with smooth areas, edges and noise; the time depends on none of them."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    base = np.stack([np.sin(x / 90), np.cos(y / 70), np.sin((x + y) / 40)], -1)
    noise = np.random.default_rng(0).standard_normal((height, width, 1), np.float32)
    return (128 + 90 * base + 20 * noise).clip(0, 255).astype(np.uint8)


def _machine() -> dict[str, Any]:
    load = os.getloadavg()[0]
    return {
        "cpu": _cpu_name(),
        "cores": ops.available_cores(),
        "load": round(load, 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "library": "C++" if ops.cpu_kernels() is not None else "NumPy fallback",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()


def _render(report: dict[str, Any], rows: list[Row]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']};"
        f" {machine['library']}, Pillow {machine['pillow']}, NumPy {machine['numpy']}",
        "copy bandwidth, read + written: "
        + ", ".join(f"{n} thr. {rate} GB/s" for n, rate in report["copy_gigabytes_per_s"].items()),
        f"results checked; medians of {report['runs']} alternated runs",
    ]
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        lines += ["", f"{name}: {same[0].megabytes} MB, reference {same[0].reference_ms} ms"]
        lines += [
            f"  {row.threads} thr.  whole {row.whole_ms:8.2f} ms = {row.speedup:5.1f}x faster"
            f"   kernel {row.kernel_ms:8.2f} ms, {row.gigabytes_per_s:5.1f} GB/s ="
            f" {row.percent_of_copy:5.1f} % of copy, limited by {row.limited_by}"
            for row in same
        ]
    return "\n".join(lines)
