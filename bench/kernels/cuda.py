"""The CUDA kernels on a device: equal to the CPU library first, then time and share of bandwidth.

    internvl-edge bench kernels --device cuda [--json] [--store DIR]

Times are of CUDA events around a graph of `LAUNCHES` calls, the median of several such; the copy
bandwidth is a device-to-device copy's, timed the same way. Bytes are the input read once and the
output written once: what lies between the passes of tiling counts against the kernel.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.kernels.cpu import FEATURES, INT8_SCALE, WrongResultError, photo
from internvl_edge.kernels import ops
from internvl_edge.kernels.cuda import (
    CANDIDATE,
    SELECT_MOST,
    CudaKernels,
    read_candidates,
    select_scratch,
)
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends.cuda import Cuda

LAUNCHES = 20
GROUPS = 7
#: A 4K photo as 40 tiles and a thumbnail; InternViT-6B's output for 41 tiles.
SIZE, GRID, TILES = (3840, 2160), {"columns": 8, "rows": 5}, 41
#: InternLM2's.
VOCAB = 92_553
COPY_BYTES = 512 << 20


@dataclass(frozen=True)
class DeviceRow:
    """One kernel at 41 tiles, or the selection of one row."""

    name: str
    kernel_ms: float
    megabytes: float
    gigabytes_per_s: float
    percent_of_copy: float


def run_cuda_kernels(*, as_json: bool = False, store: Path | None = None) -> int:
    """Check and time every kernel on the current device; print; return 0, or 1 if one is wrong.

    Args:
        as_json: print the report as JSON.
        store: directory to write it to as well, as <device>-<date>.json.

    Raises:
        DeviceError, BuildError: no device, driver, bindings or nvcc.
        OutputError: the directory cannot be written to.
    """
    cuda = Cuda.open()
    path = None if store is None else store / f"kernels-{_slug(cuda.name)}-{date.today()}.json"
    check_writable(path)
    try:
        with cuda.active():
            report = DeviceBench(cuda).report()
    except WrongResultError as error:
        print(f"WRONG: {error}")
        return 1
    if path is not None:
        write_result(report, path)
    print(json.dumps(report, indent=2) if as_json else _render(report))
    return 0


def _slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _render(report: dict[str, Any]) -> str:
    lines = [
        f"{report['device']} (sm_{report['sm']}), driver {report['driver']}; device-to-device copy,"
        f" read + written: {report['copy_gigabytes_per_s']} GB/s; results equal to the CPU library"
    ]
    lines += [
        f"  {row['name']}: {row['kernel_ms']:.3f} ms, {row['megabytes']} MB,"
        f" {row['gigabytes_per_s']} GB/s = {row['percent_of_copy']} % of copy"
        for row in report["rows"]
    ]
    return "\n".join(lines)


class DeviceBench:
    """Kernels on a device, and the copy bandwidth they are held against."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.driver, self.stream = cuda, cuda.driver, cuda.stream
        self.kernels = CudaKernels(cuda.driver)
        self.copy = self._copy_bandwidth()

    def report(self) -> dict[str, Any]:
        """Every kernel, and what it ran on.

        Raises:
            WrongResultError: a kernel's result is not the CPU library's.
        """
        tilings = (("nchw", "float32"), ("nchw", "float16"), ("patches", "float16"))
        rows = [self.tiling("tiles", "uint8")]  # what the runtime uses
        rows += [self.tiling(layout, dtype) for layout, dtype in tilings]
        rows += [self.shuffle(dtype) for dtype in ("float16", "int8")]
        rows.append(self.selection())
        return {
            "device": self.cuda.name,
            "sm": "{}{}".format(*self.cuda.capability),
            "driver": int(self.driver("cuDriverGetVersion")),
            "date": str(date.today()),
            "launches": LAUNCHES,
            "groups": GROUPS,
            "copy_gigabytes_per_s": round(self.copy / 1e9, 1),
            "rows": [asdict(row) for row in rows],
        }

    def tiling(self, layout: str, dtype: str) -> DeviceRow:
        pixels = photo(*SIZE)
        options: dict[str, Any] = GRID | {"layout": layout, "dtype": dtype}
        expected = ops.tile(pixels, **options)
        image = DeviceArray.of(self.driver, pixels)
        out = DeviceArray(self.driver, expected.shape, dtype)
        name = f"tiling {SIZE[0]}x{SIZE[1]} -> 40+1 tiles, {dtype} {layout}"

        def launch() -> None:
            self.kernels.tile(image, out=out, stream=self.stream, **options)

        launch()
        if not np.array_equal(out.to_host(), expected):
            raise WrongResultError(f"{name}: differs from the CPU library")
        row = self._row(name, launch, pixels.nbytes + expected.nbytes)
        image.free()
        out.free()
        return row

    def shuffle(self, dtype: str) -> DeviceRow:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((TILES, *FEATURES[1:]), np.float32).astype(np.float16)
        norm = {k: rng.standard_normal(4 * x.shape[2], np.float32) for k in ("weight", "bias")}
        options: dict[str, Any] = {"dtype": dtype, "scale": INT8_SCALE if dtype == "int8" else None}
        expected = ops.pixel_shuffle(x, **norm, **options)
        source = DeviceArray.of(self.driver, x)
        on_device: dict[str, Any] = {
            key: DeviceArray.of(self.driver, array) for key, array in norm.items()
        }
        out = DeviceArray(self.driver, expected.shape, dtype)
        name = f"pixel shuffle + LayerNorm {TILES}x{x.shape[1] - 1}x{x.shape[2]} float16 -> {dtype}"

        def launch() -> None:
            self.kernels.pixel_shuffle(source, out=out, stream=self.stream, **on_device, **options)

        launch()
        gap = np.abs(out.to_host().astype(np.float32) - expected.astype(np.float32))
        limit = 1.0 if dtype == "int8" else np.spacing(np.abs(expected)).astype(np.float32) + 1e-5
        if (gap > limit).any() or np.mean(gap > 0) > 1e-2:
            raise WrongResultError(f"{name}: differs from the CPU library by up to {gap.max()}")
        row = self._row(name, launch, x[:, 1:].nbytes + expected.nbytes)
        for array in (source, out, *on_device.values()):
            array.free()
        return row

    def selection(self) -> DeviceRow:
        """The largest of one row of logits: bound by its three launches, not by bytes."""
        logits = np.random.default_rng(0).standard_normal(VOCAB, np.float32)
        source = DeviceArray.of(self.driver, logits)
        out = DeviceArray(self.driver, (SELECT_MOST,), CANDIDATE)
        scratch = DeviceArray(self.driver, (select_scratch(VOCAB, SELECT_MOST),), CANDIDATE)
        name = f"largest {SELECT_MOST} of {VOCAB} logits"

        def launch() -> None:
            self.kernels.select(source, out=out, scratch=scratch, stream=self.stream)

        launch()
        ids, _ = read_candidates(out.to_host())
        if not np.array_equal(ids, np.argsort(-logits, kind="stable")[:SELECT_MOST]):
            raise WrongResultError(f"{name}: differs from NumPy's sort")
        row = self._row(name, launch, logits.nbytes + out.nbytes)
        for array in (source, out, scratch):
            array.free()
        return row

    def _row(self, name: str, launch: Callable[[], Any], nbytes: int) -> DeviceRow:
        seconds = self._time(launch)
        rate = nbytes / seconds
        return DeviceRow(
            name=name,
            kernel_ms=round(seconds * 1e3, 4),
            megabytes=round(nbytes / 1e6, 1),
            gigabytes_per_s=round(rate / 1e9, 1),
            percent_of_copy=round(100 * rate / self.copy, 1),
        )

    def _copy_bandwidth(self) -> float:
        """Bytes a second, read plus written, of a large copy on the device."""
        source, target = (self.cuda.empty((COPY_BYTES,), np.uint8) for _ in range(2))
        seconds = self._time(lambda: self.cuda.copy(source.address, target.address, COPY_BYTES))
        return 2 * COPY_BYTES / seconds

    def _time(self, launch: Callable[[], Any]) -> float:
        """Seconds of one launch, which has run before (a graph must not allocate).

        The launches are recorded as a CUDA graph, so that the device never waits for Python:
        queueing one call takes the host longer than running it takes the device.
        """
        with self.cuda.capture() as graph:
            for _ in range(LAUNCHES):
                launch()
        groups = []
        for _ in range(GROUPS):
            start = self.cuda.event()
            graph.launch()
            stop = self.cuda.event()
            stop.wait()
            groups.append(start.seconds_until(stop) / LAUNCHES)
        return statistics.median(groups)
