"""One matrix product of a graph by itself: how ONNX Runtime packs it, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

#: Operators that pack a weight: which input it is, and which has the dtype of the first.
PACKED_OPERATORS = {"MatMulNBits": (1, 2), "QGemm": (3, 2), "Gemm": (1, 1)}


def node_model(node: onnx.NodeProto, tensors: Mapping[str, TensorProto]) -> onnx.ModelProto:
    """Build a model of one matrix product alone.

    Args:
        node: a QGemm, MatMulNBits or Gemm.
        tensors: its initialisers by name; the first input is given when it runs.
    """
    inputs = [tensors[name] for name in node.input if name in tensors]
    kind = tensors[node.input[PACKED_OPERATORS[node.op_type][1]]].data_type
    floats = TensorProto.FLOAT16 if kind == TensorProto.FLOAT16 else TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info(node.input[0], kind, ["rows", None])],
        [helper.make_tensor_value_info(node.output[0], floats, ["rows", None])],
        inputs,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
