"""Weights of integer products as unsigned bytes, for CPUs on which the signed ones saturate.

The stored graph holds int8 weights with zero point 0. The same integers as uint8 with zero point
128 take another kernel, which is exact everywhere; see `runtime.products`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

#: Which inputs of a QGemm are its weight and the weight's zero point.
WEIGHT, ZERO_POINT = 3, 5
#: Added to int8, and what a byte's sign bit becomes when it is flipped.
SHIFT = 128


def make_unsigned(model: onnx.ModelProto) -> set[str]:
    """Turn the weights of every QGemm from int8 into uint8, in place.

    Args:
        model: with external data, which is left as it is.

    Returns:
        Names of the weights whose bytes must be flipped when they are read: `byte ^ SHIFT`.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "QGemm"]
    weights = {node.input[WEIGHT] for node in products}
    for name in weights:
        tensors[name].data_type = TensorProto.UINT8
    for name in {node.input[ZERO_POINT] for node in products}:
        shifted = numpy_helper.to_array(tensors[name]).astype(np.int64) + SHIFT
        tensors[name].CopyFrom(numpy_helper.from_array(shifted.astype(np.uint8), name))
    return weights
