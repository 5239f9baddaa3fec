"""What integers gain on this machine, layer by layer at InternVL 1.5's true width.

    internvl-edge bench kernels precision [--threads N] [--json]

One layer of InternViT-6B on one tile, the vision graph from pixels to image embeddings cut to two
layers, one layer of InternLM2-20B decoding and prefilling, each in float32 and quantised, run
alternately so that a busy machine slows both. Float32 does not fit most machines whole, so the time
of the uncut vision graph is computed: the cut one's and 43 layers more. Arithmetic-bound phases
stand beside the machine's own float32 matrix product, memory-bound ones beside its own read
bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.ceilings import read_bandwidth
from internvl_edge.bench.common.turns import in_turns, session_options
from internvl_edge.bench.kernels.products import SHAPE, FormRate, measure_forms
from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision
from internvl_edge.bundle.rope import rope_rows
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.groups import projector_groups, vision_groups
from internvl_edge.export.calibration.units import Unit, X, language_unit, vision_unit
from internvl_edge.export.checkpoint.weights import WeightReader
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat
from internvl_edge.export.graphs.dialects import Dialect
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.graphs.vision import build_vision
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_kernel import own_kernel
from internvl_edge.runtime.backends.products import use_exact_products
from internvl_edge.runtime.backends.tower import tower_kernel
from internvl_edge.runtime.options import add_threads

REPEATS = 9
#: Layers of the vision graph that is run.
CUT_LAYERS = 2
CONTEXT = 512
PREFILL = 256

Feed = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Row:
    """One phase: medians in milliseconds, and what the quantised run reaches."""

    phase: str
    float_ms: float
    quantised_ms: float
    ratio: float
    achieved: float
    unit: str
    ceiling: float
    percent: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_threads(parser)
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    count = arguments.threads or len(os.sched_getaffinity(0))
    gflops = _matrix_rate(count)
    read = read_bandwidth(count) / 1e9
    forms = measure_forms(count)
    rows = [*_vision_rows(count, gflops), *_language_rows(count, gflops, read)]
    if arguments.json:
        machine = {"threads": count, "cpu_features": cpu_features()}
        measured = {"rows": list(map(asdict, rows)), "forms": list(map(asdict, forms))}
        print(json.dumps(machine | measured, indent=2))
        return 0
    print(f"CPU features: {' '.join(cpu_features())}")
    print(f"W8A8 product {' x '.join(map(str, SHAPE))} in turns: {_rates(forms)}")
    print(f"{count} threads; float32 product {gflops:.0f} GFLOP/s, read {read:.1f} GB/s")
    print(f"{'phase':34} {'fp32 ms':>9} {'int ms':>8} {'ratio':>6}  achieved (of ceiling)")
    for row in rows:
        print(
            f"{row.phase:34} {row.float_ms:9.2f} {row.quantised_ms:8.2f} {row.ratio:5.2f}x"
            f"  {row.achieved:.0f} {row.unit} ({row.percent:.0f}%)"
        )
    return 0


def _rates(forms: Sequence[FormRate]) -> str:
    return ", ".join(
        f"{rate.form} {rate.gflops:.0f} GFLOP/s ({'exact' if rate.exact else 'INEXACT'}"
        f"{', in use' if rate.used else ''})"
        for rate in forms
    )


def _vision_rows(threads: int, gflops: float) -> list[Row]:
    spec = internvl_1_5()
    vision, layers = spec.vision, spec.vision.layers_run
    random = np.random.default_rng(0)
    x = random.standard_normal((vision.sequence_length, vision.hidden_size)).astype(np.float32)
    tile = random.integers(0, 256, (1, vision.image_size, vision.image_size, 3), np.uint8)
    linear = LinearPlan("int8", input_scale=4 / 127)
    layer, cut = (
        _compare(unit, _plan(unit, linear), list(unit.feeds("fp32")), threads)[0]
        for unit in (vision_unit(spec, 0, x), _graph_unit(spec, CUT_LAYERS, tile))
    )
    whole = (cut[0] + (layers - CUT_LAYERS) * layer[0], cut[1] + (layers - CUT_LAYERS) * layer[1])
    layer_flops, ends_flops = _vision_flops(spec)
    return [
        _row(phase, taken, flops, "GFLOP/s", gflops)
        for phase, taken, flops in (
            ("vision layer, 1 tile, W8A8", layer, layer_flops),
            (f"vision graph, {CUT_LAYERS} layers", cut, ends_flops + CUT_LAYERS * layer_flops),
            (f"vision graph, {layers}, computed", whole, ends_flops + layers * layer_flops),
        )
    ]


def _vision_flops(spec: ModelSpec) -> tuple[int, int]:
    """Operations of one layer and of both ends, as in the models' cost: linear and attention."""
    vision, wide = spec.vision, spec.language.hidden_size
    rows, width, mlp = vision.sequence_length, vision.hidden_size, vision.intermediate_size
    layer = 2 * rows * (4 * width**2 + 2 * width * mlp) + 4 * rows**2 * width
    patches = 2 * vision.grid**2 * 3 * vision.patch_size**2 * width
    return layer, patches + 2 * vision.tokens_per_tile * wide * (vision.shuffled_size + wide)


def _graph_unit(spec: ModelSpec, layers: int, tiles: NDArray[np.uint8]) -> Unit:
    """The vision graph from uint8 tiles to image embeddings, with its first layers only."""
    cut = replace(spec, vision=replace(spec.vision, num_hidden_layers=layers, select_layer=-1))

    def build(dialect: Dialect, reader: WeightReader, _: CachePrecision) -> None:
        build_vision(cut, dialect, reader, "fp32")

    groups = [group for layer in range(layers) for group in vision_groups(cut.vision, layer)]
    return Unit(
        "graph", build, lambda _: iter([{contract.TILES: tiles}]), [*groups, *projector_groups()]
    )


def _row(phase: str, taken: tuple[float, float], work: float, unit: str, ceiling: float) -> Row:
    """Work in operations or bytes, milliseconds of (float, quantised)."""
    float_ms, int_ms = taken
    rate = work / int_ms / 1e6
    return Row(
        phase, float_ms, int_ms, float_ms / int_ms, rate, unit, ceiling, 100 * rate / ceiling
    )


def _language_rows(threads: int, gflops: float, read: float) -> list[Row]:
    spec = internvl_1_5().language
    x = np.random.default_rng(0).standard_normal((PREFILL, spec.hidden_size)).astype(np.float32)
    unit = language_unit(spec, 0, x, [PREFILL])
    weights = spec.hidden_size * (spec.query_size + 2 * spec.key_value_size + spec.query_size)
    weights += 3 * spec.hidden_size * spec.intermediate_size
    feeds = [_decoder_feed(x[:1]), _decoder_feed(x)]
    flops = 2 * PREFILL * weights
    rows = []
    for form in (BlockFormat(4, 128), BlockFormat(4, 32), BlockFormat(8, 128)):
        plan = _plan(unit, LinearPlan("blocks", form=form, ratios=(1.0,)))
        name = f"INT{form.bits} block {form.block}"
        decode, fill = _compare(unit, plan, feeds, threads)
        nbytes = weights * (form.bits / 8 + 4 / form.block)
        rows += [
            _row(f"decode at {CONTEXT} keys, {name}", decode, nbytes, "GB/s", read),
            _row(f"prefill {PREFILL} tokens, {name}", fill, flops, "GFLOP/s", gflops),
        ]
    return rows


def _decoder_feed(x: NDArray[np.float32]) -> Feed:
    """Rows appended behind a cache that holds `CONTEXT` positions in all."""
    spec = internvl_1_5().language
    cos, sin = rope_rows(spec, spec.rope_theta, 0, CONTEXT)
    cache = np.zeros(contract.cache_shape(spec, CONTEXT), np.float32)
    return {
        X: x,
        contract.ROPE_COS: cos.astype(np.float32),
        contract.ROPE_SIN: sin.astype(np.float32),
        contract.LAST_POSITION: np.array([CONTEXT - 1], np.int32),
        contract.TOTAL_LENGTH: np.array(CONTEXT, np.int32),
        contract.past_key(0): cache,
        contract.past_value(0): cache,
    }


def _plan(unit: Unit, linear: LinearPlan) -> QuantPlan:
    return QuantPlan({name: linear for group in unit.groups for name in group.linears})


def _compare(
    unit: Unit, plan: QuantPlan, feeds: list[Feed], threads: int
) -> list[tuple[float, float]]:
    """Median milliseconds of (float, quantised) for each feed."""
    with scratch_folder() as folder:
        runs = {
            name: _runner(unit, chosen, folder / name, threads)
            for name, chosen in (("float", QuantPlan()), ("quantised", plan))
        }
        results = []
        for feed in feeds:
            timed = in_turns({name: partial(run, feed) for name, run in runs.items()}, REPEATS)
            results.append((1e3 * timed["float"].seconds, 1e3 * timed["quantised"].seconds))
    return results


def _runner(unit: Unit, plan: QuantPlan, folder: Path, threads: int) -> Callable[[Feed], list[Any]]:
    ort = load_onnxruntime()

    folder.mkdir()
    dialect = OnnxRuntimeDialect(GraphBuilder("unit"), plan)
    unit.build(dialect, WeightReader(SyntheticWeights(internvl_1_5()), "float32"), "fp32")
    dialect.graph.save(folder, lambda _: None)
    options = session_options(threads)
    options.log_severity_level = 3
    use_exact_products(options)
    tower = any(linear.kind == "int8" for linear in plan.linears.values())
    model = (tower_kernel() if tower else own_kernel(BLOCKS)).give(folder / "unit.onnx", options)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result = session.get_outputs()[0].name  # not the cache, which a language layer also gives
    return lambda feed: list(session.run([result], feed))


def _matrix_rate(threads: int) -> float:
    """GFLOP/s of ONNX Runtime's own float32 matrix product, 1025 x 3200 x 12800."""
    ort = load_onnxruntime()
    from onnx import TensorProto, helper, numpy_helper

    rows, inner, columns = 1025, 3200, 12800
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.random((inner, columns), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": random.random((rows, inner), np.float32)}
    times = []
    for _ in range(5):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / statistics.median(times) / 1e9
