"""One graph through TensorRT for RTX: what its builder says is understood, whatever it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import needs_builder
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.export.tensorrt import rtx as trt
from internvl_edge.export.tensorrt.builder import ShapeRange
from internvl_edge.export.tensorrt.built import Product, as_built, products, weight_bytes
from internvl_edge.export.tensorrt.layers import Operand, parse_layers
from internvl_edge.export.tensorrt.rtx import build
from internvl_edge.runtime import DeviceError, ExportError

pytestmark = needs_builder


def _matrix_graph(nodes: Sequence[onnx.NodeProto], stored: Sequence[Any]) -> onnx.ModelProto:
    """Float16 `x (rows, 64)` to `y (rows, 32)`."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["rows", 32])],
        [numpy_helper.from_array(values, name) for name, values in stored],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


PROFILE = {"x": ShapeRange((1, 64), (1, 64), (16, 64))}


def test_a_w8a8_product_is_seen_as_integers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (64, 32)).astype(np.int8)
    scale, scales = np.array(0.1, np.float16), np.full(32, 0.01, np.float16)
    model = _matrix_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "scales"], ["matrix"], axis=1),
            helper.make_node("MatMul", ["d", "matrix"], ["y"], name="product"),
        ],
        [("w", weight), ("scale", scale), ("zero", np.array(0, np.int8)), ("scales", scales)],
    )
    assert weight_bytes(model.graph) == 64 * 32 + 2 + 1 + 64
    (product,) = products(model.graph)
    assert (product.weight, product.activation) == ("int8", "int8")
    trial = build(model.SerializeToString(), tmp_path / "graph.onnx", PROFILE, 80)
    result = trial.built
    built = as_built(product, result.layers)
    assert built.types == "int8 x int8"
    assert not built.widened
    assert not built.apart
    assert result.weight_bytes == pytest.approx(weight.nbytes, abs=1024)  # and scales, made float32
    assert trial.plan_bytes > result.weight_bytes
    if sys.platform == "linux":
        assert result.own_bytes is not None
        assert trial.plan_bytes < result.own_bytes < result.peak_bytes


#: As RTX 1.7 lists a pair of products it joined, their INT8 blocks made float16 (names shortened).
JOINED = """Layers:
Name: __myl_MulCast_myl0_18, LayerType: kgen, Inputs: [], Constants: [ { Name: c0, Dimensions: \
[128,768], Strides: [768,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear \
format }, { Name: c1, Dimensions: [768,1], Strides: [1,1], StrideOrder: [1,0], Datatype: Half, \
Format: (Linear) Row major linear format }], Outputs: [ { Name: t7, Dimensions: [128,768], \
Strides: [768,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], \
TacticName: __myl_MulCast_0xdf, StreamId: 0, Metadata: [ONNX Layer: /w3.weight][ONNX Layer: /w3]
Name: /w3_U50+/w1_U52_myl0_19, LayerType: gemm, Inputs: [ { Name: t6, Dimensions: [-1,128], \
Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }, \
{ Name: t7, Dimensions: [128,768], Strides: [768,1], StrideOrder: [1,0], Datatype: Half, Format: \
(Linear) Row major linear format }], Constants: [ { Name: alpha, Dimensions: [1], Strides: [1], \
StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [], \
TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /w3][ONNX Layer: /w1]
"""


def test_weights_expanded_to_float_are_seen() -> None:
    layers = parse_layers(JOINED)
    assert [layer.kind for layer in layers] == ["kgen", "gemm"]
    assert layers[1].inputs[0] == Operand("t6", "half", (-1, 128))
    for node in ("/w1", "/w3"):
        built = as_built(Product(node, weight="int8", activation=None), layers)
        assert built.types == "fp16 x fp16 apart"
        assert built.widened
        assert not as_built(Product(node, weight="fp16", activation=None), layers).widened
    assert as_built(Product("/w2", weight="int8", activation=None), layers).types == "not listed"


def test_a_graph_that_does_not_parse_names_the_node(tmp_path: Path) -> None:
    model = _matrix_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="odd one")],
        [("w", np.zeros((64, 32), np.int8))],
    )
    with pytest.raises(ExportError, match="does not build it: MatMulInteger odd one"):
        build(model.SerializeToString(), tmp_path / "graph.onnx", PROFILE, 80)


def test_a_builder_that_dies_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ExportError, match="ended with status 1"):
        build(b"", tmp_path / "graph.onnx", PROFILE, 80)


def test_without_the_builder_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match=r"pip install 'internvl-edge\[tensorrt\]'"):
        trt.require_builder()


@given(st.text())
def test_any_listing_is_read_or_skipped(text: str) -> None:
    for layer in parse_layers(text):
        assert layer.name in text
