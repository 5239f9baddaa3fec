"""What a TensorRT builder is given: a bundle's graph with its free choices made.

A bundle serves any context length, and its files are standard ONNX, so that ONNX Runtime runs them.
TensorRT's cache update wants the context as a number when the graph is parsed, and its attention an
attribute of TensorRT's own where the fused kernels do not take a shape or dtype. Both are set here,
in memory: the weights stay where they are.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

#: The contract's name of the cache's length.
CONTEXT = "context"
#: Without it, attention that no fused kernel takes (float32, for one) fails the build.
DECOMPOSABLE = "TRT_decomposable"


def engine_form(path: Path, context: int) -> bytes:
    """A graph for TensorRT's parser; tell that the file's path, to find the weights beside it.

    Args:
        path: vision.onnx or language.onnx of a TensorRT dialect.
        context: positions of the KV cache.
    """
    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CONTEXT:
                dim.dim_value = context
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
    return bytes(model.SerializeToString())
