"""TensorRT dialects: standard operators, strongly typed, quantisation as explicit Q/DQ.

What both levels share. A graph computes in one dtype, float16 unless it is a float32 bundle, and
guards what float16 is too small for:
- the residual stream, norms and activation functions are float32 (TensorRT fuses such elementwise
  chains, so the casts cost no pass over memory of their own);
- a linear layer in `QuantPlan.wide` has a float32 result. Quantised layers get it from float32
  scales, with the same integers; a float16 matrix is stored and multiplied in float32.

The levels differ in norms and attention: `tensorrt_modern`, `tensorrt_portable`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import ExportError
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.graphs.dialects import Experts, HeadNorms, Linear
from internvl_edge.export.graphs.dialects.tensorrt_weights import (
    check_form,
    pack_columns,
    pack_rows,
    pad_to_even,
)
from internvl_edge.export.graphs.graph import GraphBuilder

FLOAT = LinearPlan("float")
#: Weights in blocks, and 4-bit integers, came to ONNX with opset 21.
BLOCK_OPSET = 21


class TensorRtDialect(ABC):
    """The parts of `Dialect` that both levels write alike.

    Args:
        dtype: the graph computes in: "float16" or "float32".
    """

    def __init__(self, graph: GraphBuilder, plan: QuantPlan, dtype: str) -> None:
        self.graph = graph
        self.plan = plan
        self.dtype = dtype
        self._shapes: dict[tuple[int, ...], str] = {}

    def linear(
        self, x: str, weight: Weight, bias: Weight | None, name: str, gain: Weight | None = None
    ) -> str:
        graph, plan = self.graph, self.plan.linears.get(weight.name, FLOAT)
        dtype = "float32" if weight.name in self.plan.wide else self.dtype
        x = graph.cast(x, dtype, f"{name}.input")
        if plan.input_factors is not None:
            factors = Weight.held(f"{weight.name}.input_factors", plan.input_factors.astype(dtype))
            x = graph.node("Mul", [x, graph.weight(factors)], f"{name}.rescaled")
        added = None if bias is None else graph.weight(replace(bias, dtype=dtype))
        if (form := plan.form) is not None:
            check_form(weight, form)
        if form is not None and form.bits == 4:
            y = self._block_product(x, weight, plan, name)
            y = y if added is None else graph.node("Add", [y, added], f"{name}.biased")
        else:
            if plan.kind == "int8":
                x = self._activations(x, plan, f"{weight.name}.input_scale", name)
            stored = pad_to_even(weight) if plan.kind == "blocks" and bias is None else weight
            y = self._product(x, self._matrix(stored, plan, dtype, name), added, name)
            if stored is not weight:
                bounds = [graph.shape(0), graph.shape(weight.shape[0]), graph.shape(1)]
                y = graph.node("Slice", [y, *bounds], f"{name}.rows")
        if gain is None:
            return y
        wide = graph.cast(y, "float32", f"{name}.wide")
        scale = graph.weight(replace(gain, dtype="float32"))
        return graph.node("Mul", [wide, scale], f"{name}.scaled")

    def _product(self, x: str, weight: str, bias: str | None, name: str) -> str:
        # Gemm keeps the checkpoint's (out, in) layout: weights stream without a transpose.
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self.graph.node("Gemm", inputs, name, {"transB": 1})

    def _matrix(self, weight: Weight, plan: LinearPlan, dtype: str, name: str) -> str:
        """`(out, in)` as stored: float, or int8 with a scale per row of the result's dtype.

        Weight-only int8 has no blocks: TensorRT documents them for INT4 only, and RTX 1.7 builds
        them but dequantises in a layer of its own on every pass, and joins w1 and w3 as float16
        (1.43 times the decoder's bytes on tiny_ocr).
        """
        graph = self.graph
        if plan.kind not in ("int8", "blocks"):
            return graph.weight(replace(weight, dtype=dtype))
        values, scales = (graph.weight(part) for part in pack_rows(weight, dtype))
        return graph.node("DequantizeLinear", [values, scales], f"{name}.weight", {"axis": 0})

    def _activations(self, x: str, plan: LinearPlan, scale_name: str, name: str) -> str:
        """int8 activations with one scale; with the weight's Q/DQ, an integer product."""
        graph, dtype = self.graph, self.graph.dtype(x)
        smallest = float(np.finfo(dtype).tiny)  # for a layer whose input is all but zero
        scale = graph.constant(np.array(max(plan.input_scale, smallest), dtype), scale_name)
        zero = graph.constant(np.zeros((), np.int8), "zero_point")
        quantized = graph.node("QuantizeLinear", [x, scale, zero], f"{name}.quantized")
        return graph.node("DequantizeLinear", [quantized, scale, zero], f"{name}.dequantized")

    def _block_product(self, x: str, weight: Weight, plan: LinearPlan, name: str) -> str:
        """Weight-only INT4 blocks along the inputs, on `(in, out)`: what TensorRT documents."""
        graph = self.graph
        graph.opset = max(graph.opset, BLOCK_OPSET)
        packed = pack_columns(weight, plan, graph.dtype(x))
        values, scales = (graph.weight(part) for part in packed)
        attributes = {"axis": 0, "block_size": weight.shape[1] // packed[1].shape[0]}
        matrix = graph.node("DequantizeLinear", [values, scales], f"{name}.weight", attributes)
        return graph.node("MatMul", [x, matrix], name)

    def split_linear(
        self, x: str, weight: Weight, bias: Weight | None, parts: int, name: str
    ) -> list[str]:
        y = self.linear(x, weight, bias, name)
        attributes = {"axis": -1, "num_outputs": parts}
        return self.graph.nodes("Split", [y], f"{name}.split", parts, attributes)

    def gelu_mlp(self, x: str, up: Linear, down: Linear) -> str:
        y = self.linear(x, up.weight, up.bias, up.name)
        y = self.gelu(y, "gelu")
        y = self.linear(y, down.weight, down.bias, down.name, down.gain)
        # What follows the projector is the graph's output; the tower's gain makes y float32.
        return y if down.gain is not None else self.graph.cast(y, self.dtype, f"{down.name}.cast")

    @abstractmethod
    def gelu(self, x: str, name: str) -> str:
        """Exact (erf) GELU in float32."""

    def layer_norm(self, x: str, weight: Weight, bias: Weight, eps: float, name: str) -> str:
        graph = self.graph
        wide = graph.cast(x, "float32", f"{name}.wide")
        stored = [graph.weight(replace(part, dtype="float32")) for part in (weight, bias)]
        attributes = {"axis": -1, "epsilon": eps}
        normed = graph.node("LayerNormalization", [wide, *stored], name, attributes)
        return graph.cast(normed, self.dtype, f"{name}.cast")

    @abstractmethod
    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str:
        """RMSNorm over the last axis in float32, the result in the graph's dtype."""

    def add_rms_norm(
        self, x: str, residual: str, weight: Weight, eps: float, name: str
    ) -> tuple[str, str]:
        total = self.add(residual, x, f"{name}.sum")
        return self.rms_norm(total, weight, eps, name), total

    def gated_silu(self, gate: str, up: str, name: str) -> str:
        graph = self.graph
        gate = graph.cast(gate, "float32", f"{name}.gate")
        up = graph.cast(up, "float32", f"{name}.up")
        sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{name}.silu")
        return graph.node("Mul", [silu, up], name)

    def mixture(self, x: str, experts: Experts, name: str) -> str:
        raise ExportError(
            f"{experts.router.label} chooses between experts, and graphs for TensorRT have no such"
            " operator; export for onnxruntime"
        )

    def add(self, x: str, y: str, name: str) -> str:
        graph = self.graph
        x, y = (graph.cast(v, "float32", f"{name}.{side}") for v, side in ((x, "x"), (y, "y")))
        return graph.node("Add", [x, y], name)

    def split_heads(
        self, qkv: str, norms: HeadNorms | None, spec: LanguageSpec, name: str
    ) -> list[str]:
        """Query, key and value `(tokens, heads * head_dim)`, normed where the decoder does it."""
        graph = self.graph
        sizes = graph.shape(spec.query_size, spec.key_value_size, spec.key_value_size)
        query, key, value = graph.nodes("Split", [qkv, sizes], f"{name}.split", 3, {"axis": -1})
        if norms is not None:
            query = self._normed_heads(query, norms.query, spec.query_size, norms, f"{name}.q_norm")
            key = self._normed_heads(key, norms.key, spec.key_value_size, norms, f"{name}.k_norm")
        return [query, key, value]

    def _normed_heads(self, x: str, weight: Weight, width: int, norms: HeadNorms, name: str) -> str:
        graph = self.graph
        heads = graph.node("Reshape", [x, graph.shape(-1, weight.shape[0])], f"{name}.heads")
        normed = self.rms_norm(heads, weight, norms.eps, name)
        return graph.node("Reshape", [normed, graph.shape(-1, width)], f"{name}.rows")

    def of_sequences(self, *dims: int) -> str:
        """The shape `(sequences, *dims)`: made once, read by all layers."""
        graph = self.graph
        if not self._shapes:
            shape = graph.node("Shape", [contract.POSITIONS], "places")
            first, second = graph.shape(0), graph.shape(1)
            self._shapes[()] = graph.node("Slice", [shape, first, second, first], "sequences")
        if dims not in self._shapes:
            parts, name = [self._shapes[()], graph.shape(*dims)], "x".join(map(str, dims))
            self._shapes[dims] = graph.node("Concat", parts, f"shape.{name}", {"axis": 0})
        return self._shapes[dims]

    def rotary_rows(self, table: str, name: str) -> str:
        """Rows of the positions in tables `(sequences, context, head_dim / 2)`:
        `(sequences, tokens, head_dim / 2)`."""
        graph = self.graph
        places = graph.node("Unsqueeze", [contract.POSITIONS, graph.shape(2)], f"{name}.places")
        return graph.node("GatherND", [table, places], name, {"batch_dims": 1})

    def heads(self, x: str, heads: int, head_dim: int, name: str) -> str:
        """Rows `(sequences * tokens, heads * head_dim)` -> `(sequences, heads, tokens,
        head_dim)`."""
        graph = self.graph
        x = graph.cast(x, self.dtype, f"{name}.cast")
        x = graph.node("Reshape", [x, self.of_sequences(-1, heads, head_dim)], f"{name}.split")
        return graph.node("Transpose", [x], name, {"perm": [0, 2, 1, 3]})

    def rows(self, x: str, width: int, name: str) -> str:
        """`(sequences, heads, tokens, head_dim)` -> `(sequences * tokens, width)`."""
        graph = self.graph
        x = graph.node("Transpose", [x], f"{name}.tokens", {"perm": [0, 2, 1, 3]})
        return graph.node("Reshape", [x, graph.shape(-1, width)], f"{name}.rows")
