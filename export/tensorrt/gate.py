"""The gate a TensorRT bundle passes without a GPU, before anybody builds engines from it.

    internvl-edge inspect --check BUNDLE [--reference BUNDLE] [--all-gpus] [--json]

1. The files are well-formed ONNX, and attention has an explicit mask.
2. ONNX Runtime's CPU kernels compute with them what they should (`oracle`).
3. TensorRT for RTX parses and builds every graph, stores no weight twice or widened, and
   multiplies in the types asked for (`trt`, `built`).
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from internvl_edge.bundle.contract import BATCH, LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.graphs.dialects.engine_form import engine_form
from internvl_edge.export.tensorrt.builder import ShapeRange
from internvl_edge.export.tensorrt.built import as_built, products, weight_bytes
from internvl_edge.export.tensorrt.oracle import Comparison, compare_bundles
from internvl_edge.export.tensorrt.rtx import build, require_builder
from internvl_edge.runtime.decoding.passes import MAX_CHUNK

#: Weights in an engine may take this much more or less than in the file.
WEIGHT_TOLERANCE = 0.05
#: Bytes by which the tables an engine adds (strides, padding) may exceed that in a tiny model.
WEIGHT_SLACK = 4096
MIB = 1 << 20


@dataclass(frozen=True)
class EngineShapes:
    """Shapes that engines are built for: one profile from a single row to the largest.

    Attributes:
        context: positions of the KV cache, fixed.
        tokens: most rows of one pass of the decoder.
        tiles: most tiles of one pass of the vision tower.
        rows: most rows that get logits. With one row only, RTX multiplies by an int8 matrix
            that a layer of its own dequantised first.
        sequences: most sequences of one pass of the decoder.
    """

    context: int = 4096
    tokens: int = MAX_CHUNK
    tiles: int = 4
    rows: int = 8
    sequences: int = 4


DEFAULT_SHAPES = EngineShapes()


@dataclass(frozen=True)
class GraphReport:
    """One graph built for one GPU.

    Attributes:
        graph: file name.
        capability: compute capability, "80" is 8.0.
        parsed_layers: layers of the parsed network.
        engine_layers: layers of the engine.
        products: matrix products by the types they are computed in; see `BuiltProduct.types`.
        widened: nodes whose product takes wider types than the graph gives it.
        apart: nodes whose matrix a layer before them dequantises on every pass: slower, not wrong.
        expected_bytes: weights in the file.
        weight_bytes: weights in the engine.
        plan_bytes: the plan: weights and compiled kernels.
        scratch_bytes: device memory for activations.
        peak_bytes: the builder's peak memory; see `trt.Build`.
        seconds: parsing and building.
    """

    graph: str
    capability: int
    parsed_layers: int
    engine_layers: int
    products: Mapping[str, int]
    widened: Sequence[str]
    apart: Sequence[str]
    expected_bytes: int
    weight_bytes: int
    plan_bytes: int
    scratch_bytes: int
    peak_bytes: int | None
    seconds: float

    @property
    def failures(self) -> list[str]:
        """Say what does not hold."""
        place = f"{self.graph}, GPU {self.capability}"
        found = [f"{place}: {node} is wider than in the graph" for node in self.widened]
        allowed = WEIGHT_TOLERANCE * self.expected_bytes + WEIGHT_SLACK
        if abs(self.weight_bytes - self.expected_bytes) > allowed:
            ratio = self.weight_bytes / self.expected_bytes
            found.append(f"{place}: weights take {ratio:.2f} times their bytes in the file")
        return found


@dataclass(frozen=True)
class GateReport:
    """All that was checked.

    Attributes:
        path: the bundle.
        dialect: what it was written for.
        precision: how each part is stored.
        versions: of the tools that checked.
        comparisons: on ONNX Runtime's CPU kernels.
        graphs: by graph and GPU.
        broken: rules of the dialect that the files break.
    """

    path: str
    dialect: str
    precision: Mapping[str, str]
    versions: Mapping[str, str]
    comparisons: Sequence[Comparison]
    graphs: Sequence[GraphReport]
    broken: Sequence[str]

    @property
    def failures(self) -> list[str]:
        """Say what does not hold; empty: the bundle passes."""
        found = list(self.broken)
        found += [
            f"{item.name}: {item.sqnr_db:.1f} dB, at least {item.floor_db:.0f} is asked for"
            for item in self.comparisons
            if not item.holds
        ]
        return found + [failure for graph in self.graphs for failure in graph.failures]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "failures": self.failures, "passed": not self.failures}


def check_bundle(
    path: Path,
    *,
    reference: Path | None = None,
    capabilities: Sequence[int] = (80,),
    shapes: EngineShapes = DEFAULT_SHAPES,
) -> GateReport:
    """Check a bundle written for TensorRT.

    Args:
        reference: a bundle of the onnxruntime dialect with the same weights, to compare with;
            without one, decoding is compared with prefill only.
        capabilities: GPUs to build for; see `trt.CAPABILITIES`.
        shapes: what to build for; a shorter `context` is taken where the model has it.

    Raises:
        BundleError: not a bundle, or of the onnxruntime dialect; the reference does not fit.
        DeviceError: TensorRT for RTX is not installed.
        EngineBuildError: it does not build a graph.
    """
    bundle = open_bundle(path)
    if not bundle.manifest.traits.engines:
        raise BundleError(
            f"{named(path)} is of the onnxruntime dialect, the check is for TensorRT's graphs",
            [Remedy.FOR_TENSORRT, Remedy.FOR_PORTABLE],
        )
    versions = {
        "tensorrt_rtx": require_builder(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }
    names = (VISION_GRAPH, LANGUAGE_GRAPH)
    context = min(shapes.context, bundle.spec.language.max_context)
    shapes = replace(shapes, context=context)
    models = {name: _checked(bundle.file(name)) for name in names}
    return GateReport(
        path=str(path),
        dialect=bundle.manifest.dialect,
        precision=bundle.manifest.precision,
        versions=versions,
        comparisons=compare_bundles(path, reference),
        graphs=[
            build_graph(bundle.file(name), capability, shapes)
            for name in names
            for capability in capabilities
        ],
        broken=[rule for model in models.values() for rule in broken_rules(model.graph)],
    )


def broken_rules(graph: onnx.GraphProto) -> list[str]:
    """Attention that TensorRT's parser reads otherwise than ONNX means it.

    It takes `is_causal=1` as aligned with the first key (ONNX: with the last), so that a decode
    step sees key 0 only, and ignores input 6, the number of keys in use.
    """
    found = []
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        if any(item.name == "is_causal" and item.i for item in node.attribute):
            found.append(f"{node.name}: is_causal=1; TensorRT aligns it with the first key")
        if len(node.input) > 6 and node.input[6]:
            found.append(f"{node.name}: nonpad_kv_seqlen is given; TensorRT ignores it")
    return found


def build_graph(path: Path, capability: int, shapes: EngineShapes) -> GraphReport:
    """Build one graph of a bundle for one GPU.

    Raises:
        DeviceError: TensorRT for RTX is not installed.
        EngineBuildError: it does not build the graph.
    """
    form = engine_form(path, shapes.context)
    graph = onnx.load_from_string(form).graph
    trial = build(form, path, profile_of(graph, shapes), capability)
    built = trial.built
    computed = [as_built(product, built.layers) for product in products(graph)]
    return GraphReport(
        graph=path.name,
        capability=capability,
        parsed_layers=built.parsed_layers,
        engine_layers=len(built.layers),
        products=dict(Counter(product.types for product in computed).most_common()),
        widened=[item.product.node for item in computed if item.widened],
        apart=[item.product.node for item in computed if item.apart],
        expected_bytes=weight_bytes(graph),
        weight_bytes=built.weight_bytes,
        plan_bytes=trial.plan_bytes,
        scratch_bytes=built.scratch_bytes,
        peak_bytes=built.own_bytes,
        seconds=built.seconds,
    )


def profile_of(graph: onnx.GraphProto, shapes: EngineShapes) -> dict[str, ShapeRange]:
    """A range for every input that has a symbolic dimension, from one row to the largest."""
    context = shapes.context
    tokens, rows = min(shapes.tokens, context), min(shapes.rows, context)
    largest = {
        "tiles": shapes.tiles,
        "tokens": tokens,
        "rows": rows,
        "keys": context,
        BATCH: shapes.sequences,
        "each": tokens,
    }
    smallest = dict.fromkeys(largest, 1)
    # Decoding is what an engine does most: one row, over as much cache as there can be.
    typical = smallest | {"keys": context}

    def shape(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> tuple[int, ...]:
        dims = value.type.tensor_type.shape.dim
        return tuple(sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims)

    return {
        value.name: ShapeRange(*(shape(value, sizes) for sizes in (smallest, typical, largest)))
        for value in graph.input
        if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
    }


def takes_batch(graph: onnx.GraphProto) -> bool:
    """Tell whether a language graph takes several sequences in a pass; older ones take one."""
    dims = (dim for value in graph.input for dim in value.type.tensor_type.shape.dim)
    return any(dim.dim_param == BATCH for dim in dims)


def render_gate(report: GateReport) -> str:
    """The report as aligned text."""
    precision = ", ".join(f"{part} {kind}" for part, kind in report.precision.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [f"{report.path}: {report.dialect}, {precision}", f"checked with {versions}", ""]
    lines.append(f"{'on ONNX Runtime':28} {'SQNR dB':>8} {'at least':>8}")
    lines += [
        f"{item.name:28} {item.sqnr_db:8.1f} {item.floor_db:8.0f}" for item in report.comparisons
    ]
    lines += [
        "",
        f"{'graph':14} {'GPU':>4} {'parsed':>7} {'engine':>7} {'in file':>9} {'weights':>9}"
        f" {'plan':>9} {'scratch':>9} {'peak':>9} {'s':>6}  (MiB)",
    ]
    lines += [_graph_line(graph) for graph in report.graphs]
    lines += ["", "products as built"]
    for graph in report.graphs:
        kinds = ", ".join(f"{count} {kind}" for kind, count in graph.products.items())
        lines.append(f"{graph.graph:14} {graph.capability:4}  {kinds}")
    notes = [
        f"slow: {graph.graph}, GPU {graph.capability}: {node} dequantises its matrix on every pass"
        for graph in report.graphs
        for node in graph.apart
    ]
    verdict = [f"fails: {failure}" for failure in report.failures] or ["passes"]
    return "\n".join([*lines, "", *notes, *verdict])


def _graph_line(graph: GraphReport) -> str:
    sizes = (
        graph.expected_bytes,
        graph.weight_bytes,
        graph.plan_bytes,
        graph.scratch_bytes,
        graph.peak_bytes,
    )
    columns = " ".join(f"{'-':>9}" if size is None else f"{size / MIB:9.2f}" for size in sizes)
    return (
        f"{graph.graph:14} {graph.capability:4} {graph.parsed_layers:7} {graph.engine_layers:7}"
        f" {columns} {graph.seconds:6.1f}"
    )


def _checked(path: Path) -> onnx.ModelProto:
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise BundleError(f"{named(path)} is not valid ONNX: {reason(error)}") from error
    return onnx.load(path, load_external_data=False)
