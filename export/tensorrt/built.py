"""How an engine computes the matrix products of its ONNX graph: types and bytes, as built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from internvl_edge.export.tensorrt.layers import EngineLayer

#: Bits of a value, by the names ONNX and the builder give its type.
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int64": 64, "int32": 32, "int8": 8, "int4": 4}
_STORED = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.BOOL: "int8",
    TensorProto.INT4: "int4",
}
_BUILT = {"float": "fp32", "half": "fp16", "bfloat16": "bf16"}
_PRODUCTS = ("Gemm", "MatMul", "Attention")
#: What may stand between a matrix and the product that reads it.
_VIEWS = ("DequantizeLinear", "Transpose", "Cast", "Reshape")


@dataclass(frozen=True)
class Product:
    """One matrix product of the ONNX graph.

    Attributes:
        node: its name.
        weight: the stored matrix's type; None where both factors are computed.
        activation: "int8" where quantised activations are asked for, else None: the graph's own.
    """

    node: str
    weight: str | None
    activation: str | None


@dataclass(frozen=True)
class BuiltProduct:
    """How an engine computes one product; types are None where the builder does not list it.

    Attributes:
        activation: the type of the first factor.
        weight: the type the matrix is stored in.
        apart: the matrix is dequantised by a layer before the product, which costs writing and
            reading all of it in `activation`'s type on each pass.
    """

    product: Product
    activation: str | None
    weight: str | None
    apart: bool = False

    @property
    def types(self) -> str:
        """Return the types as text: "int8 x int8", "fp16 x int4 apart", "attention fp16"."""
        if self.activation is None:
            return "not listed"
        if self.product.weight is None:
            return f"attention {self.activation}"
        return f"{self.activation} x {self.weight}{' apart' * self.apart}"

    @property
    def widened(self) -> bool:
        """Tell whether a factor takes more bits than the graph gives it."""
        asked = (self.product.weight, self.product.activation)
        built = (self.weight, self.activation)
        pairs = zip(asked, built, strict=True)
        return any(a is not None and b is not None and BITS[b] > BITS[a] for a, b in pairs)


def weight_bytes(graph: onnx.GraphProto) -> int:
    """Bytes of all stored tensors, 4-bit ones packed."""
    return sum(
        -(-int(np.prod(tensor.dims)) * BITS[_STORED[tensor.data_type]] // 8)
        for tensor in graph.initializer
    )


def products(graph: onnx.GraphProto) -> Iterator[Product]:
    """Every matrix product of a graph."""
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: _STORED[tensor.data_type] for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        weight = None
        if node.op_type != "Attention":
            weight = _stored_type(node.input[1], makers, stored)
        yield Product(node.name, weight, _quantised_type(node.input[0], makers))


def as_built(product: Product, layers: Sequence[EngineLayer]) -> BuiltProduct:
    """Find how an engine computes one product."""
    found = sorted((layer for layer in layers if product.node in layer.nodes), key=_rank)
    if not found:
        return BuiltProduct(product, None, None)
    layer = found[0]
    inputs = [_name(operand.dtype) for operand in layer.inputs if len(operand.shape) > 1]
    if product.weight is None:
        return BuiltProduct(product, inputs[0] if inputs else None, None)
    if matrix := _matrix(layer):
        return BuiltProduct(product, _activation(inputs, matrix), matrix)
    makers = {output.name: maker for maker in layers for output in maker.outputs}
    before = (makers.get(operand.name) for operand in layer.inputs)
    made = [matrix for maker in before if maker is not None and (matrix := _matrix(maker))]
    if not made or not inputs:
        return BuiltProduct(product, None, None)
    return BuiltProduct(product, _activation(inputs, made[0]), made[0], apart=True)


def _rank(layer: EngineLayer) -> int:
    """The layer that multiplies first; others of the same node prepare or finish."""
    if layer.kind == "gemm" or "gemm" in layer.name.split("_"):
        return 0
    return 1 if layer.kind == "runtime_fusion" else 2


def _matrix(layer: EngineLayer) -> str | None:
    """Type of the largest matrix among a layer's constants."""
    matrices = [c for c in layer.constants if sum(size > 1 for size in c.shape) > 1]
    if not matrices:
        return None
    return _name(max(matrices, key=lambda matrix: int(np.prod(matrix.shape))).dtype)


def _activation(inputs: Sequence[str], weight: str) -> str:
    """Engines are strongly typed: a float matrix meets its own type, an integer one int8 or, after
    it is dequantised inside the layer, a float. Other inputs are added to the result.
    """
    if weight not in ("int8", "int4"):
        return weight
    if "int8" in inputs:
        return "int8"
    return min(inputs, key=lambda name: BITS.get(name, 64))


def _stored_type(
    value: str, makers: dict[str, onnx.NodeProto], stored: dict[str, str]
) -> str | None:
    while value not in stored:
        if value not in makers or makers[value].op_type not in _VIEWS:
            return None
        value = makers[value].input[0]
    return stored[value]


def _quantised_type(value: str, makers: dict[str, onnx.NodeProto]) -> str | None:
    if value in makers and makers[value].op_type == "DequantizeLinear":
        return "int8"
    return None


def _name(dtype: str) -> str:
    return _BUILT.get(dtype, dtype)
