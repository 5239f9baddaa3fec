"""A head in parts gives the same logits bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.export.prepare.split import split_outputs

INNER, BLOCK = 64, 32
Inputs = dict[str, NDArray[Any]]


def head(columns: int, bits: int, zeros: bool) -> tuple[onnx.ModelProto, Inputs]:
    """A product before and one that makes the output, and the weights by name."""
    rng = np.random.default_rng(columns)
    blocks = INNER // BLOCK
    weights: Inputs = {
        "w": rng.integers(0, 256, (columns, blocks, BLOCK * bits // 8), np.uint8),
        "s": rng.standard_normal((columns, blocks)).astype(np.float32),
        "first": rng.standard_normal((INNER, INNER)).astype(np.float32),
    }
    if zeros:
        weights["z"] = rng.integers(0, 256, (columns, -(-blocks * bits // 8)), np.uint8)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["inner"]),
        helper.make_node(
            "MatMulNBits",
            ["inner", "w", "s", *(["z"] if zeros else [])],
            ["logits"],
            "head",
            domain="com.microsoft",
            K=INNER,
            N=columns,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,
        ),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", TensorProto.FLOAT, ["rows", INNER])],
        [value("logits", TensorProto.FLOAT, ["rows", columns])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), weights


def run(model: onnx.ModelProto | Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(given, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@settings(max_examples=60, deadline=None)
@example(columns=130, bits=8, zeros=False, widest=64 * 64)
@example(columns=64, bits=4, zeros=True, widest=1)
@given(
    columns=st.integers(1, 400),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    widest=st.integers(1, 30_000),
)
def test_the_same_bit_for_bit(columns: int, bits: int, zeros: bool, widest: int) -> None:
    model, weights = head(columns, bits, zeros)
    x = np.random.default_rng(1).standard_normal((3, INNER)).astype(np.float32)
    whole = run(model, x)
    split_outputs(model, widest)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(run(model, x), whole)
    parts = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    # A part is as wide as it may be, up to the multiple of 64 columns its width is rounded to.
    column = weights["w"][0].nbytes
    assert all(held[part.input[1]].nbytes <= max(widest, column) + 64 * column for part in parts)
    assert len(parts) == 1 or all(held[part.input[1]].shape[0] % 64 == 0 for part in parts[:-1])
    np.testing.assert_array_equal(np.concatenate([held[p.input[1]] for p in parts]), weights["w"])


@pytest.mark.parametrize("widest", [5_000, 1 << 20])
def test_weights_in_a_file_are_not_touched(tmp_path: Path, widest: int) -> None:
    model, _ = head(300, 8, zeros=True)
    x = np.random.default_rng(1).standard_normal((3, INNER)).astype(np.float32)
    whole, path = run(model, x), tmp_path / "head.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="head.data", size_threshold=0)
    before = (tmp_path / "head.data").read_bytes()
    placed = onnx.load(str(path), load_external_data=False)
    split_outputs(placed, widest)
    onnx.save(placed, str(path))
    assert len(placed.graph.node) == (2 if widest > 300 * 64 else 1 + 3 + 1)
    np.testing.assert_array_equal(run(path, x), whole)
    assert (tmp_path / "head.data").read_bytes() == before


def test_products_inside_a_graph_stay(tmp_path: Path) -> None:
    model, _ = head(300, 8, zeros=False)
    model.graph.node.append(helper.make_node("Relu", ["logits"], ["y"]))
    model.graph.output[0].name = "y"
    before = model.SerializeToString(deterministic=True)
    split_outputs(model, 1)
    assert model.SerializeToString(deterministic=True) == before
