"""The graphs by which a machine is tried, as `export` writes them; see `runtime.products`,
`runtime.int8_cache` and `runtime.tower`.

    python -m internvl_edge.export.graphs.dialects.probes FOLDER

writes them; those in runtime/backends/probes/ are the ones in use.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision, Tensor
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import CacheScales, LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat, Blocks
from internvl_edge.export.graphs.dialects import CacheNames, Experts
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.dialects.tower_probe import add_wanted, build_tower_probe
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.kernels.build import operator_library
from internvl_edge.runtime.backends import int8_cache
from internvl_edge.runtime.backends.blocks import experts_input
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.products import (
    BLOCKS,
    COLUMNS,
    LIMITS,
    WIDTH,
    Product,
    full_range,
)
from internvl_edge.runtime.backends.tower import PROBE_INPUT, TOWER, probe_input


def write_probes(folder: Path) -> None:
    """Write `<product>.onnx` for every product, cache.onnx, experts.onnx and tower.onnx, their
    weights inside."""
    for product in get_args(Product):
        onnx.save(probe(product), folder / f"{product}.onnx")
    onnx.save(cache_probe(), folder / "cache.onnx")
    onnx.save(experts_probe(), folder / "experts.onnx")
    onnx.save(tower_probe(folder), folder / "tower.onnx")


def probe(product: Product) -> onnx.ModelProto:
    """Build the graph of one product: float32 `(rows, WIDTH)` to `(rows, COLUMNS)`, for each block
    size where there are blocks."""
    plans = _plans(product)
    values = full_range(COLUMNS, WIDTH, *LIMITS[product]).astype(np.float32)
    graph = GraphBuilder("probe")
    dialect = OnnxRuntimeDialect(graph, QuantPlan(plans))
    x = graph.input(Tensor("x", "float32", ("rows", WIDTH)))
    for name in plans:
        y = dialect.linear(x, Weight.held(name, values), None, name)
        graph.output(y, Tensor(f"y.{name}", "float32", ("rows", COLUMNS)))
    return _whole(graph)


def cache_probe() -> onnx.ModelProto:
    """Build the graph of one attention over an int8 cache whose scales are one."""
    return attention_graph(int8_cache.SPEC, "int8")


def attention_graph(
    spec: LanguageSpec, cache: CachePrecision, scales: CacheScales | None = None
) -> onnx.ModelProto:
    """Build the graph of one attention: float32 queries, keys and values to what is attended.

    Args:
        cache: precision of keys and values.
        scales: of an int8 cache; None: all are one.
    """
    ones = np.ones((spec.num_key_value_heads, spec.head_dim), np.float32)
    plan = QuantPlan(cache={0: scales or CacheScales(ones, ones)} if cache == "int8" else {})
    graph = GraphBuilder("probe")
    width = spec.query_size + 2 * spec.key_value_size
    qkv = graph.input(Tensor(int8_cache.QKV, "float32", ("rows", width)))
    for tensor in contract.language_inputs(spec, "fp32", cache):
        if tensor.name not in (contract.EMBEDDINGS, contract.LOGIT_ROWS):
            graph.input(tensor)
    names = CacheNames(0, contract.past_key(0), contract.past_value(0))
    attended, key, value = OnnxRuntimeDialect(graph, plan).cached_attention(
        qkv, names, spec, "attend"
    )
    graph.output(attended, Tensor(int8_cache.ATTENDED, "float32", ("rows", spec.query_size)))
    shape = (1, spec.num_key_value_heads, "context", spec.head_dim)
    graph.output(key, Tensor(int8_cache.KEY, contract.CACHE_DTYPE[cache], shape))
    graph.output(value, Tensor(int8_cache.VALUE, contract.CACHE_DTYPE[cache], shape))
    return _whole(graph)


def experts_probe() -> onnx.ModelProto:
    """Build the graph of a layer of experts: float32 `(rows, WIDTH)` to the same, and what that
    should be of `blocks.experts_input`."""
    count, chosen, width, form = 5, 2, 32, BlockFormat(4, 32)
    random = np.random.default_rng(0)
    router, gated, down = (
        random.standard_normal(shape).astype(np.float32) / np.float32(8)
        for shape in ((count, WIDTH), (count * 2 * width, WIDTH), (count * WIDTH, width))
    )
    plan = LinearPlan("blocks", form=form)
    graph = GraphBuilder("probe")
    dialect = OnnxRuntimeDialect(graph, QuantPlan({"gated": plan, "down": plan}))
    x = graph.input(Tensor("x", "float32", ("rows", WIDTH)))
    held = (Weight.held("router", router), Weight.held("gated", gated), Weight.held("down", down))
    y = dialect.mixture(x, Experts(*held, per_token=chosen, normed=True), "experts")
    graph.output(y, Tensor("y", "float32", ("rows", WIDTH)))
    model = _whole(graph)
    session = load_onnxruntime().InferenceSession(model.SerializeToString())
    add_wanted(model, session.run(None, {"x": experts_input()})[0])
    return model


def tower_probe(folder: Path) -> onnx.ModelProto:
    """Build the graph of a vision tower's operations, with the bits that they give here.

    Args:
        folder: for the graph while it is run.
    """
    model = _whole(build_tower_probe())
    onnx.save(model, folder / "tower.onnx")
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    given = OwnKernel(TOWER, operator_library(), "").give(folder / "tower.onnx", options)
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    add_wanted(model, session.run(None, {PROBE_INPUT: probe_input()})[0])
    return model


def _whole(graph: GraphBuilder) -> onnx.ModelProto:
    """Return a graph with its weights inside."""
    with scratch_folder() as folder:
        graph.save(folder, lambda _: None)
        model = onnx.load(str(folder / "probe.onnx"), load_external_data=False)
        load_external_data_for_model(model, str(folder))
    return model


def _plans(product: Product) -> dict[str, LinearPlan]:
    """Return a plan by the name of each weight; all scales are one."""
    if product == "w8a8":
        # Two, as in a real graph: what they might share must not matter.
        return {name: LinearPlan("int8", input_scale=1.0) for name in ("w0", "w1")}
    forms = [BlockFormat(8 if product == "int8" else 4, block) for block in BLOCKS]
    return {
        f"w{form.block}": LinearPlan("blocks", form=form, packed=_blocks(form)) for form in forms
    }


def _blocks(form: BlockFormat) -> Blocks:
    low, high = -form.middle, form.levels - form.middle
    codes = full_range(COLUMNS, WIDTH, low, high) + form.middle
    if form.bits == 4:  # the earlier input in the lower half of each byte
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    count = form.blocks(WIDTH)
    packed = codes.astype(np.uint8).reshape(COLUMNS, count, -1)
    return Blocks(packed, np.ones((COLUMNS, count), np.float32), None)


if __name__ == "__main__":
    write_probes(Path(sys.argv[1]))
