"""Single layers in the TensorRT dialects, run by ONNX Runtime: formats, and what float16 cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.bundle.contract import DialectName, Tensor
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat, dequantize_blocks, quantize_blocks
from internvl_edge.export.graphs.dialects.registry import new_dialect
from internvl_edge.export.graphs.dialects.tensorrt_operators import OPERATORS, refusals
from internvl_edge.export.graphs.dialects.tensorrt_weights import pack_columns, pack_rows
from internvl_edge.runtime import ExportError

NAME = "some.weight"
PLANS = {
    "float": LinearPlan("float"),
    "int8": LinearPlan("int8", input_scale=64 / 127),
    "int8 rows": LinearPlan("blocks", form=BlockFormat(8, 64), ratios=(1.0,)),
    "int4": LinearPlan("blocks", form=BlockFormat(4, 64), ratios=(1.0,)),
}


def _matrix(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 3),
    block=st.sampled_from([64, 128]),
    seed=st.integers(0, 9),
)
def test_int4_columns_are_the_other_dialects_integers(
    rows: int, blocks: int, block: int, seed: int
) -> None:
    """Read back as ONNX stores them, in the other layout: equal, odd widths included."""
    weight, form = _matrix(rows, blocks * block, seed), BlockFormat(4, block)
    plan = LinearPlan("blocks", form=form, ratios=(1.0,))
    values, scales = pack_columns(Weight.held(NAME, weight), plan, "float32")
    assert (values.shape, values.dtype) == (weight.shape[::-1], "int4")
    stored = np.concatenate(list(values.cast_blocks()))
    assert stored.nbytes == values.nbytes == -(-weight.size // 2)
    proto = TensorProto(dims=values.shape, data_type=TensorProto.INT4, raw_data=stored.tobytes())
    integers = numpy_helper.to_array(proto).astype(np.float32)
    (factors,) = scales.cast_blocks()
    back = integers * np.repeat(np.asarray(factors, np.float32), block, axis=0)
    quantized = quantize_blocks(weight, form, ratios=(1.0,))
    np.testing.assert_array_equal(back.T, dequantize_blocks(quantized, form, weight.shape[1]))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_rows_are_rounded_with_the_scale_that_is_stored(size: float) -> None:
    """Scales below float16's normal range (6e-5) have few bits; the integers make up for it."""
    weight = size * _matrix(16, 256, 0)
    values, scales = pack_rows(Weight.held(NAME, weight), "float16")
    (integers,), (factors,) = values.cast_blocks(), scales.cast_blocks()
    wide = np.asarray(factors, np.float32)[:, np.newaxis]
    error = np.abs(np.asarray(integers, np.float32) * wide - weight)
    assert (error <= 0.5001 * wide).all()  # half a step, and float32's own rounding
    # 2^-11 more than exact scales; where a scale has two bits only, a quarter.
    assert (wide[:, 0] <= 1.26 * np.abs(weight).max(axis=1) / 127).all()


def test_no_scale_is_zero() -> None:
    """TensorRT's parser refuses it."""
    weight = 1e-8 * _matrix(4, 128, 0)
    for parts in (
        pack_columns(Weight.held(NAME, weight), PLANS["int4"], "float16"),
        pack_rows(Weight.held(NAME, weight), "float16"),
    ):
        _, (stored,) = (list(part.cast_blocks()) for part in parts)
        assert (np.asarray(stored, np.float32) > 0).all()


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dialect", ["tensorrt", "tensorrt-portable"])
def test_a_wide_layer_survives_what_float16_does_not(
    tmp_path: Path, dialect: DialectName, kind: str
) -> None:
    """Products of 4e5 need float32; the layer's neighbours stay in float16."""
    weight = 1000 * _matrix(48, 128, 0)
    x = 16 * _matrix(5, 128, 1).astype(np.float16).astype(np.float32)
    exact = x @ weight.T
    assert np.abs(exact).max() > 1.2 * float(np.finfo(np.float16).max)
    results = {}
    for name, wide in (("narrow", frozenset[str]()), ("wide", frozenset([NAME]))):
        plan = QuantPlan({NAME: PLANS[kind]}, wide=wide)
        results[name] = _linear(tmp_path / name, dialect, plan, weight, x)
    assert not np.isfinite(results["narrow"]).all()
    error = np.abs(results["wide"] - exact).max() / np.abs(exact).max()
    assert error < {"float": 1e-3, "int4": 0.2}.get(kind, 0.03)


def _linear(
    folder: Path,
    dialect_name: DialectName,
    plan: QuantPlan,
    weight: NDArray[np.float32],
    x: NDArray[np.float32],
) -> NDArray[np.float64]:
    """One linear layer on a float16 input.

    Its result leaves the graph as it is: a cast to float32 behind it would hide the overflow, for
    ONNX Runtime multiplies in float32 and takes out the two casts that meet.
    """
    if dialect_name == "tensorrt" and tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("this onnxruntime has no opset 24")
    folder.mkdir()
    dialect = new_dialect(dialect_name, "layer", plan, "float16")
    graph = dialect.graph
    graph.input(Tensor("x", "float16", ("rows", weight.shape[1])))
    y = dialect.linear("x", Weight.held(NAME, weight), None, "layer")
    graph.output(y, Tensor("y", graph.dtype(y), ("rows", len(weight))))
    graph.save(folder, lambda _: None)
    session = ort.InferenceSession(str(folder / "layer.onnx"), providers=["CPUExecutionProvider"])
    (result,) = session.run(["y"], {"x": x.astype(np.float16)})
    return np.asarray(result, np.float64)


def test_a_part_of_a_block_is_refused() -> None:
    dialect = new_dialect("tensorrt", "layer", QuantPlan({NAME: PLANS["int4"]}), "float16")
    dialect.graph.input(Tensor("x", "float16", ("rows", 96)))
    with pytest.raises(ExportError, match="96 inputs, which is no multiple of the block 64"):
        dialect.linear("x", Weight.held(NAME, _matrix(8, 96, 0)), None, "layer")


def test_the_portable_limits_are_noticed() -> None:
    """Each thing TensorRT 10.3 would refuse or misread, alone in a graph."""
    assert {"MatMul", "DequantizeLinear", "LayerNormalization"} <= OPERATORS
    assert not {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"} & OPERATORS
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 128])
    int8 = numpy_helper.from_array(np.zeros((128, 4), np.int8), "w")
    scale = numpy_helper.from_array(np.ones((2, 4), np.float32), "s")
    axes = numpy_helper.from_array(np.array([-1]), "a")
    blocks = {"axis": 0, "block_size": 64}
    for node, version, expected in (
        (helper.make_node("Relu", ["x"], ["y"]), 17, None),
        (helper.make_node("Relu", ["x"], ["y"]), 21, "opset 21"),
        (helper.make_node("Gelu", ["x"], ["y"], name="g"), 20, "g: operator  Gelu"),
        (helper.make_node("Shape", ["x"], ["y"], name="g", start=1), 20, "g: start unread"),
        (helper.make_node("ReduceMean", ["x", "a"], ["y"], name="g"), 20, "g: axes unread"),
        (helper.make_node("ReduceSum", ["x", "a"], ["y"], name="g"), 20, None),
        (
            helper.make_node("DequantizeLinear", ["w", "s"], ["y"], name="g", **blocks),
            20,
            "g: blocks of DequantizeLinear that are not INT4",
        ),
    ):
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "one", [value], [out], [int8, scale, axes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
        assert list(refusals(model)) == ([] if expected is None else [expected])
