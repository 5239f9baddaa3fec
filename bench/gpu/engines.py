"""What building InternVL 1.5's TensorRT engines takes, from a few layers at its true width.

    internvl-edge bench kernels engines [--json FILE]

One and two layers of INT8 vision and INT4 language, random weights, are exported and built with
TensorRT for RTX, without a GPU. Two points give the slope per layer; the whole model's plan and the
builder's memory follow and are set beside what a Jetson has. TensorRT on the board is another
version: there the figures are estimates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import DialectName, cache_shape
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.checkpoint.names import EMBEDDING, HEAD, is_language, tensor_shapes
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.export.tensorrt.gate import DEFAULT_SHAPES, MIB, GraphReport, build_graph
from internvl_edge.export.tensorrt.rtx import require_builder
from internvl_edge.export.tensorrt.targets import get_target
from internvl_edge.export.writer import plan_export

DEPTHS = (1, 2)
CAPABILITY = 80
TARGETS = ("orin-agx-64", "orin-agx-32")
GIB = 1 << 30


@dataclass(frozen=True)
class Whole:
    """One graph of the whole model, extrapolated.

    Attributes:
        file_bytes: exactly what the export writes.
        plan_bytes: of the engine.
        peak_bytes: the builder's anonymous memory; the file's pages come on top and can go.
        scratch_bytes: device memory for activations; layers share it.
    """

    graph: str
    layers: int
    file_bytes: int
    plan_bytes: int
    peak_bytes: int
    scratch_bytes: int


def true_width(layers: int | None = None) -> ModelSpec:
    """InternVL 1.5, cut to so many layers in each part; None: whole."""
    spec = internvl_1_5()
    if layers is None:
        return spec
    return replace(
        spec,
        vision=replace(spec.vision, num_hidden_layers=layers),
        language=replace(spec.language, num_hidden_layers=layers),
    )


def integer_plan(spec: ModelSpec) -> QuantPlan:
    """INT8 vision with a scale that fits random inputs; INT4 decoder, 8-bit head."""
    linears = {}
    for name, shape in tensor_shapes(spec).items():
        if len(shape) != 2 or name == EMBEDDING:
            continue
        bits = 8 if name == HEAD else 4
        linears[name] = (
            LinearPlan("blocks", form=BlockFormat(bits, 128), ratios=(1.0,))
            if is_language(name)
            else LinearPlan("int8", input_scale=4 / 127)
        )
    return QuantPlan(linears)


def build_layers(layers: int, folder: Path, dialect: DialectName = "tensorrt") -> list[GraphReport]:
    """Export both graphs at true width with so many layers and build them."""
    spec = true_width(layers)
    recipe = Recipe("int8", "int4", "fp16", dialect=dialect)
    layout = plan_export(SyntheticWeights(spec), recipe, integer_plan(spec))
    reports = []
    for graph in (layout.vision, layout.language):
        files = graph.save(folder, lambda _: None)
        path = next(folder / name for name in files if name.endswith(".onnx"))
        reports.append(build_graph(path, CAPABILITY, DEFAULT_SHAPES))
        for name in files:
            (folder / name).unlink()
    return reports


def extrapolate(small: Sequence[GraphReport], large: Sequence[GraphReport]) -> list[Whole]:
    """The whole model's graphs from builds of `DEPTHS` layers."""
    spec = true_width()
    layers = (spec.vision.layers_run, spec.language.num_hidden_layers)
    span = DEPTHS[1] - DEPTHS[0]
    found = []
    for count, one, two in zip(layers, small, large, strict=True):
        more = (count - DEPTHS[1]) / span

        def grown(before: int | None, after: int | None, more: float = more) -> int:
            before, after = before or 0, after or 0
            return int(after + more * (after - before))

        found.append(
            Whole(
                two.graph,
                count,
                grown(one.expected_bytes, two.expected_bytes),
                grown(one.plan_bytes, two.plan_bytes),
                grown(one.peak_bytes, two.peak_bytes),
                two.scratch_bytes,
            )
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace) -> int:
    """Build, print the tables and store them; returns the exit status."""
    check_writable(arguments.json)
    version = require_builder()
    builds = []
    for layers in DEPTHS:
        with scratch_folder() as folder:
            builds.append(build_layers(layers, folder))
    whole = extrapolate(*builds)
    verdicts = [verdict(name, whole) for name in TARGETS]
    print(f"TensorRT for RTX {version}, INT8 vision, INT4 language, GPU {CAPABILITY}")
    print(render_builds(builds))
    print(render_whole(whole, verdicts))
    if arguments.json is not None:
        report = {
            "tensorrt_rtx": version,
            "shapes": asdict(DEFAULT_SHAPES),
            "builds": {
                str(layers): [asdict(graph) for graph in graphs]
                for layers, graphs in zip(DEPTHS, builds, strict=True)
            },
            "whole": [asdict(graph) for graph in whole],
            "targets": verdicts,
            "machine": describe_machine(0),
        }
        write_result(report, arguments.json)
    return 0


def verdict(name: str, whole: Sequence[Whole]) -> dict[str, Any]:
    """Whether the largest build, and both engines with a cache, fit a board's memory."""
    target, spec = get_target(name), true_width()
    values = 2 * spec.language.num_hidden_layers
    for size in cache_shape(spec.language, DEFAULT_SHAPES.context):
        values *= size
    running = sum(graph.plan_bytes + graph.scratch_bytes for graph in whole) + 2 * values
    building = max(graph.peak_bytes for graph in whole)
    return {
        "target": name,
        "usable_bytes": target.usable_bytes,
        "building_bytes": building,
        "running_bytes": running,
        "builds": building <= target.usable_bytes,
        "runs": running <= target.usable_bytes,
    }


def render_builds(builds: Sequence[Sequence[GraphReport]]) -> str:
    """One line per graph and depth, in MiB."""
    lines = [
        f"{'graph':14} {'layers':>6} {'file':>8} {'weights':>8} {'plan':>8} {'plan/file':>9}"
        f" {'scratch':>8} {'peak':>8} {'s':>5}  products"
    ]
    for layers, graphs in zip(DEPTHS, builds, strict=True):
        for graph in graphs:
            kinds = ", ".join(f"{count} {kind}" for kind, count in graph.products.items())
            peak = (graph.peak_bytes or 0) / MIB
            lines.append(
                f"{graph.graph:14} {layers:6} {graph.expected_bytes / MIB:8.1f}"
                f" {graph.weight_bytes / MIB:8.1f} {graph.plan_bytes / MIB:8.1f}"
                f" {graph.plan_bytes / graph.expected_bytes:9.3f}"
                f" {graph.scratch_bytes / MIB:8.1f} {peak:8.1f} {graph.seconds:5.1f}  {kinds}"
            )
    return "\n".join(lines)


def render_whole(whole: Sequence[Whole], verdicts: Sequence[dict[str, Any]]) -> str:
    """The extrapolation, in GiB."""
    lines = ["", f"{'whole model':14} {'layers':>6} {'file':>8} {'plan':>8} {'peak':>8}  (GiB)"]
    lines += [
        f"{graph.graph:14} {graph.layers:6} {graph.file_bytes / GIB:8.2f}"
        f" {graph.plan_bytes / GIB:8.2f} {graph.peak_bytes / GIB:8.2f}"
        for graph in whole
    ]
    for item in verdicts:
        lines.append(
            f"{item['target']}: {item['usable_bytes'] / GIB:.1f} GiB usable;"
            f" building takes {item['building_bytes'] / GIB:.1f}"
            f" ({'fits' if item['builds'] else 'does not fit'}), running with a cache of"
            f" {DEFAULT_SHAPES.context} tokens {item['running_bytes'] / GIB:.1f}"
            f" ({'fits' if item['runs'] else 'does not fit'})"
        )
    return "\n".join(lines)
