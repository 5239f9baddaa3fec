"""The graph by which the kernels of a vision tower are tried; see `runtime.backends.tower`.

One of each operation, as `export` writes them: a float product, norms of both kinds with and
without a sum before, attention over normed heads, GELU with and without rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from internvl_edge.bundle.contract import Tensor
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.graphs.dialects import AttentionShape, Linear
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.runtime.backends.tower import PROBE_INPUT, PROBE_SHAPE, PROBE_WANTED

HEADS = 3
EPSILON = 1e-6
COMPUTED = "y"
_, TOKENS, WIDTH = PROBE_SHAPE


def build_tower_probe() -> GraphBuilder:
    """Build the graph, without what it must give."""
    factors = np.linspace(0.5, 1.5, WIDTH).astype(np.float32)
    rounded = {name: LinearPlan("int8", input_scale=0.03) for name in ("qkv", "proj", "up")}
    rounded["down"] = LinearPlan("int8", input_scale=0.02, input_factors=factors)
    graph = GraphBuilder("probe")
    dialect = OnnxRuntimeDialect(graph, QuantPlan(rounded))
    x = graph.input(Tensor(PROBE_INPUT, "float32", ("rows", WIDTH)))
    x = dialect.linear(x, _matrix("patch", WIDTH), _vector("patch.bias"), "patch")
    y = dialect.layer_norm(x, _vector("norm1"), _vector("norm1.bias"), EPSILON, "norm1")
    query, key, value = dialect.split_linear(y, _matrix("qkv", 3 * WIDTH), None, 3, "qkv")
    query = dialect.rms_norm(query, _vector("q_norm"), EPSILON, "q_norm")
    key = dialect.rms_norm(key, _vector("k_norm"), EPSILON, "k_norm")
    shape = AttentionShape(TOKENS, HEADS, WIDTH)
    y = dialect.full_attention((query, key, value), shape, "attend")
    y = dialect.linear(y, _matrix("proj", WIDTH), _vector("proj.bias"), "proj", _vector("gain"))
    y, x = dialect.add_rms_norm(x, y, _vector("norm2"), EPSILON, "norm2")
    up, down = (
        Linear(_matrix(name, WIDTH), _vector(f"{name}.bias"), name) for name in ("up", "down")
    )
    with graph.scope("mlp"):
        y = dialect.gelu_mlp(y, up, down)
    x = dialect.add(x, y, "output")
    y = dialect.layer_norm(x, _vector("norm3"), _vector("norm3.bias"), EPSILON, "norm3")
    first, last = (Linear(_matrix(name, WIDTH), None, name) for name in ("first", "last"))
    graph.output(dialect.gelu_mlp(y, first, last), Tensor(COMPUTED, "float32", ("rows", WIDTH)))
    return graph


def add_wanted(model: onnx.ModelProto, wanted: NDArray[np.float32]) -> None:
    """Add what the graph must give, as a second output."""
    model.graph.initializer.append(numpy_helper.from_array(wanted, f"{PROBE_WANTED}.bits"))
    model.graph.node.append(
        onnx.helper.make_node("Identity", [f"{PROBE_WANTED}.bits"], [PROBE_WANTED])
    )
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(PROBE_WANTED, onnx.TensorProto.FLOAT, wanted.shape)
    )


def wanted_bits(path: Path) -> NDArray[np.float32]:
    """Return what a stored probe says it must give."""
    (stored,) = onnx.load(path).graph.initializer[-1:]
    return np.asarray(numpy_helper.to_array(stored))


def _matrix(name: str, rows: int) -> Weight:
    return Weight.held(name, _spread(name, rows * WIDTH).reshape(rows, WIDTH) / np.float32(8))


def _vector(name: str) -> Weight:
    return Weight.held(name, _spread(name, WIDTH))


def _spread(name: str, count: int) -> NDArray[np.float32]:
    """Return values from -1 to 1 in steps of 1/64, others for every name."""
    index = np.arange(count, dtype=np.uint64) + np.uint64(sum(map(ord, name)))
    steps = (index * np.uint64(2654435761) >> np.uint64(13)) % np.uint64(129)
    return (steps.astype(np.float32) - np.float32(64)) / np.float32(64)
