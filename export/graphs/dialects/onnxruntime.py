"""ONNX Runtime dialect: its fused `com.microsoft` operators, all with CPU and CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.errors import OptionsError
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.packing import pack_blocks, pack_channels
from internvl_edge.export.formats.plan import CacheScales, LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import ACTIVATION_ZERO_POINT
from internvl_edge.export.graphs.dialects import (
    AttentionShape,
    CacheNames,
    Experts,
    HeadNorms,
    Linear,
)
from internvl_edge.export.graphs.graph import MICROSOFT, GraphBuilder

#: Head sizes GroupQueryAttention accepts. Every released model has 64 to 128.
HEAD_MULTIPLE = 8
#: GroupQueryAttention's inputs before the scales of its cache.
CACHE_SCALES = 12

#: Most columns of one integer product in an MLP. MLAS goes through the whole int32 result once for
#: every few hundred inputs, so that must stay in cache: 1025 x 3200 inputs to 3,200, 6,400 and
#: 12,800 columns run at 3,130, 2,350 and 2,300 GFLOP/s (four Zen 5 threads with 32 MB of L3, the
#: result 13, 26 and 52 MB).
PRODUCT_COLUMNS = 4096

FLOAT = LinearPlan("float")
UNCHANGED = QuantPlan()


class OnnxRuntimeDialect:
    """See `Dialect`."""

    name: DialectName = "onnxruntime"

    def __init__(self, graph: GraphBuilder, plan: QuantPlan = UNCHANGED) -> None:
        self.graph = graph
        self.plan = plan
        self._tables: tuple[str, str] | None = None

    def linear(
        self, x: str, weight: Weight, bias: Weight | None, name: str, gain: Weight | None = None
    ) -> str:
        plan = self._plan(weight)
        if plan.kind == "int8":
            return self._int8_linear([x], Linear(weight, bias, name, gain), 1)[0]
        (x,) = self._rescaled([x], weight, name)
        if plan.kind == "blocks":
            y = self._block_linear(x, weight, bias, plan, name)
        else:
            y = self._float_linear(x, weight, bias, plan, name)
        if gain is None:
            return y
        # Not folded into float weights: half precision would lose small products to underflow.
        return self.graph.node("Mul", [y, self.graph.weight(gain)], f"{name}.scaled")

    def split_linear(
        self, x: str, weight: Weight, bias: Weight | None, parts: int, name: str
    ) -> list[str]:
        if self._plan(weight).kind == "int8":
            return self._int8_linear([x], Linear(weight, bias, name), parts)
        y = self.linear(x, weight, bias, name)
        attributes = {"axis": -1, "num_outputs": parts}
        return self.graph.nodes("Split", [y], f"{name}.split", parts, attributes)

    def gelu_mlp(self, x: str, up: Linear, down: Linear) -> str:
        integers = all(self._plan(layer.weight).kind == "int8" for layer in (up, down))
        if not integers:
            y = self.linear(x, up.weight, up.bias, up.name)
            return self.linear(self._gelu(y, "gelu"), down.weight, down.bias, down.name, down.gain)
        parts = -(-up.weight.shape[0] // PRODUCT_COLUMNS)
        wide = self._int8_linear([x], up, parts)
        activated = [self._gelu(y, _part("gelu", i, parts)) for i, y in enumerate(wide)]
        return self._int8_linear(activated, down, 1)[0]

    def _plan(self, weight: Weight) -> LinearPlan:
        return self.plan.linears.get(weight.name, FLOAT)

    def _rescaled(self, pieces: list[str], weight: Weight, name: str) -> list[str]:
        """Runs of the input's columns times the plan's factors."""
        factors = self._plan(weight).input_factors
        if factors is None:
            return pieces
        graph, count, rescaled = self.graph, len(pieces), []
        for i, (x, run) in enumerate(zip(pieces, np.array_split(factors, count), strict=True)):
            stored = graph.weight(Weight.held(_part(f"{weight.name}.input_factors", i, count), run))
            rescaled.append(graph.node("Mul", [x, stored], _part(f"{name}.rescaled", i, count)))
        return rescaled

    def _float_linear(
        self, x: str, weight: Weight, bias: Weight | None, plan: LinearPlan, name: str
    ) -> str:
        # Gemm takes the checkpoint's (out, in) layout, so weights stream without a transpose, and
        # is as fast as MatMul on (in, out): 8.9 against 9.8 ms for 256 x 2048 x 4096, two threads.
        half = plan.kind == "fp16"
        values = self._half(weight, name) if half else self.graph.weight(weight)
        inputs = [x, values, *self._bias(bias)]
        return self.graph.node("Gemm", inputs, name, {"transB": 1})

    def _half(self, weight: Weight, name: str) -> str:
        """Stored at half precision; the cast is folded when the graph is loaded."""
        stored = self.graph.weight(replace(weight, dtype="float16"))
        return self.graph.node("Cast", [stored], f"{name}.weight", {"to": TensorProto.FLOAT})

    def _int8_linear(self, pieces: list[str], layer: Linear, parts: int) -> list[str]:
        """W8A8: integer products with float results, one for each run of the weight's rows.

        Activations are unsigned with zero point 128: the same values as signed symmetric ones, and
        on x86 without AMX or VNNI-INT8 the only fast kernel. For 1025 x 1600 x 3200 on two
        AVX-512-VNNI threads: u8s8 1,790 GFLOP/s, s8s8 85, fp32 450.

        Args:
            pieces: the input `(rows, in)` as runs of columns; they are joined as bytes.
        """
        graph, weight, name, plan = self.graph, layer.weight, layer.name, self._plan(layer.weight)
        scale = graph.constant(np.array(plan.input_scale, np.float32), f"{weight.name}.input_scale")
        zero = graph.constant(np.array(ACTIVATION_ZERO_POINT, np.uint8), "activation.zero_point")
        x = self._quantized(self._rescaled(pieces, weight, name), scale, zero, name)
        results = []
        for i, packed in enumerate(pack_channels(weight, layer.bias, plan, layer.gain, parts)):
            (rows,) = packed.scales.shape
            # One for each product: ONNX Runtime makes weights unsigned one product at a time.
            weight_zero = graph.constant(
                np.zeros(rows, np.int8), f"{packed.values.name}.zero_point"
            )
            values, scales, bias = map(graph.weight, (packed.values, packed.scales, packed.bias))
            inputs = [x, scale, zero, values, scales, weight_zero, bias]
            results.append(
                graph.node("QGemm", inputs, _part(name, i, parts), {"transB": 1}, MICROSOFT)
            )
        return results

    def _quantized(self, pieces: list[str], scale: str, zero: str, name: str) -> str:
        graph, count = self.graph, len(pieces)
        quantized = [
            graph.node("QuantizeLinear", [x, scale, zero], _part(f"{name}.quantized", i, count))
            for i, x in enumerate(pieces)
        ]
        if count == 1:
            return quantized[0]
        return graph.node("Concat", quantized, f"{name}.joined", {"axis": -1})

    def _block_linear(
        self, x: str, weight: Weight, bias: Weight | None, plan: LinearPlan, name: str
    ) -> str:
        """Weight-only blocks; accuracy level 4 rounds activations to int8 per block and row."""
        form = plan.form
        if form is None:
            raise OptionsError(f"{weight.label}: a block-quantised layer needs a block format")
        values, scales, *zeros = (self.graph.weight(part) for part in pack_blocks(weight, plan))
        inputs = [x, values, scales, *(zeros or [""]), "", *self._bias(bias)]
        while not inputs[-1]:
            inputs.pop()
        attributes = {
            "N": weight.shape[0],
            "K": weight.shape[1],
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": 4,
        }
        return self.graph.node("MatMulNBits", inputs, name, attributes, MICROSOFT)

    def _bias(self, bias: Weight | None) -> list[str]:
        return [] if bias is None else [self.graph.weight(bias)]

    def layer_norm(self, x: str, weight: Weight, bias: Weight, eps: float, name: str) -> str:
        inputs = [x, self.graph.weight(weight), self.graph.weight(bias)]
        return self.graph.node("LayerNormalization", inputs, name, {"axis": -1, "epsilon": eps})

    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str:
        # Registered in the default domain, although it is not an ONNX operator.
        return self.graph.node(
            "SimplifiedLayerNormalization",
            [x, self.graph.weight(weight)],
            name,
            {"axis": -1, "epsilon": eps, "stash_type": 1},
        )

    def add_rms_norm(
        self, x: str, residual: str, weight: Weight, eps: float, name: str
    ) -> tuple[str, str]:
        normed, _, _, total = self.graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.graph.weight(weight)],
            name,
            4,
            {"epsilon": eps},
            MICROSOFT,
        )
        return normed, total

    def _gelu(self, x: str, name: str) -> str:
        return self.graph.node("Gelu", [x], name, {"approximate": "none"})

    def gated_silu(self, gate: str, up: str, name: str) -> str:
        silu = self.graph.node("QuickGelu", [gate], f"{name}.silu", {"alpha": 1.0}, MICROSOFT)
        return self.graph.node("Mul", [silu, up], name)

    def mixture(self, x: str, experts: Experts, name: str) -> str:
        """One operator: it computes the chosen experts only."""
        graph = self.graph
        logits = self.linear(x, experts.router, None, f"{name}.router")
        count = experts.router.shape[0]
        gated, down = (self._expert_weights(w, count, name) for w in (experts.gated, experts.down))
        attributes: dict[str, object] = {
            "k": experts.per_token,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,
            "normalize_routing_weights": int(experts.normed),
        }
        plan = self._plan(experts.gated)
        if plan.kind != "blocks" or plan.form is None:
            return graph.node("MoE", [x, logits, *gated, "", *down], name, attributes, MICROSOFT)
        attributes |= {"expert_weight_bits": plan.form.bits, "block_size": plan.form.block}
        # ONNX Runtime 1.31 norms the shares of QMoE whatever it is told.
        attributes["normalize_routing_weights"] = 1
        inputs = [x, logits, *gated, "", *down]
        if experts.normed:
            return graph.node("QMoE", inputs, name, attributes, MICROSOFT)
        mixed = graph.node("QMoE", inputs, f"{name}.normed", attributes, MICROSOFT)
        return graph.node("Mul", [mixed, self._chosen_share(logits, experts, name)], name)

    def _chosen_share(self, logits: str, experts: Experts, name: str) -> str:
        """What the chosen experts have together of a softmax over all: `(rows, 1)`."""
        graph = self.graph
        shares = graph.node("Softmax", [logits], f"{name}.shares", {"axis": -1})
        count = graph.shape(experts.per_token)
        largest, _ = graph.nodes("TopK", [shares, count], f"{name}.largest", 2, {"axis": -1})
        axes = graph.constant(np.array([-1], np.int64), "last_axis")
        return graph.node("ReduceSum", [largest, axes], f"{name}.share", {"keepdims": 1})

    def _expert_weights(self, weight: Weight, experts: int, name: str) -> list[str]:
        """A matrix, or its packed values and scales, with the experts as the first axis."""
        plan, (rows, columns) = self._plan(weight), weight.shape
        if plan.kind != "blocks" or plan.form is None:
            whole = replace(weight, shape=(experts, rows // experts, columns))
            return [self._half(whole, name) if plan.kind == "fp16" else self.graph.weight(whole)]
        if not plan.form.symmetric or columns % plan.form.block:
            raise OptionsError(
                f"{weight.label} holds experts of {columns} inputs, which are stored in whole"
                f" blocks without zero points: leave --asymmetric out, and pass a --block that"
                f" divides {columns}"
            )
        stored = []
        for part in pack_blocks(weight, plan):
            values = part.shape[1] * (part.shape[2] if len(part.shape) > 2 else 1)
            shape = (experts, rows // experts, values)
            stored.append(self.graph.weight(replace(part, shape=shape)))
        return stored

    def add(self, x: str, y: str, name: str) -> str:
        return self.graph.node("Add", [x, y], name)

    def full_attention(self, qkv: tuple[str, str, str], shape: AttentionShape, name: str) -> str:
        graph = self.graph
        # (tiles * tokens, width) -> (tiles, tokens, width)
        batched = graph.shape(-1, shape.tokens, shape.width)
        folded = [
            graph.node("Reshape", [x, batched], f"{name}.{part}")
            for x, part in zip(qkv, ("query", "key", "value"), strict=True)
        ]
        attended = graph.node(
            "MultiHeadAttention", folded, name, {"num_heads": shape.heads}, MICROSOFT
        )
        return graph.node("Reshape", [attended, graph.shape(-1, shape.width)], f"{name}.rows")

    def cached_attention(
        self, qkv: str, cache: CacheNames, spec: LanguageSpec, name: str
    ) -> tuple[str, str, str]:
        if spec.head_dim % HEAD_MULTIPLE:
            raise OptionsError(
                f"the decoder's head size is {spec.head_dim}; ONNX Runtime's GroupQueryAttention"
                f" takes multiples of {HEAD_MULTIPLE} only"
            )
        graph = self.graph
        dtype = graph.dtype(qkv)
        if graph.dtype(cache.past_key) == "float16":  # all of attention's floats are of one type
            qkv = graph.cast(qkv, "float16", f"{name}.half")
        rotates = spec.head_dim % contract.ROTARY_MULTIPLE == 0
        inputs = [
            *self._heads_in(qkv, cache, spec, name, rotates),
            cache.past_key,
            cache.past_value,
            contract.LAST_POSITION,
            contract.TOTAL_LENGTH,
        ]
        attributes: dict[str, object] = {
            "num_heads": spec.num_attention_heads,
            "kv_num_heads": spec.num_key_value_heads,
            "do_rotary": int(rotates),
        }
        if rotates:
            inputs += [contract.ROPE_COS, contract.ROPE_SIN]
        if (scales := self.plan.cache.get(cache.layer)) is not None:
            inputs += [""] * (CACHE_SCALES - len(inputs))
            inputs += self._cache_scales(scales, cache.layer)
            attributes |= {
                "kv_cache_bit_width": 8,
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
            }
        attended, key, value = graph.nodes(
            "GroupQueryAttention", inputs, name, 3, attributes, MICROSOFT
        )
        rows = graph.node("Squeeze", [attended, graph.shape(0)], f"{name}.rows")
        return graph.cast(rows, dtype, f"{name}.cast"), key, value

    def _heads_in(
        self, qkv: str, cache: CacheNames, spec: LanguageSpec, name: str, rotates: bool
    ) -> list[str]:
        """Return attention's first inputs: all in one, or apart where something is done to them."""
        graph = self.graph
        if rotates and cache.norms is None:
            return [graph.node("Unsqueeze", [qkv, graph.shape(0)], f"{name}.batch"), "", ""]
        sizes = graph.shape(spec.query_size, spec.key_value_size, spec.key_value_size)
        query, key, value = graph.nodes("Split", [qkv, sizes], f"{name}.split", 3, {"axis": -1})
        if (norms := cache.norms) is not None:
            query = self._normed_heads(query, norms.query, spec.query_size, norms, f"{name}.q_norm")
            key = self._normed_heads(key, norms.key, spec.key_value_size, norms, f"{name}.k_norm")
        if not rotates:
            tables = self._rows_of_tables(query)
            query = self._rotated(query, spec.num_attention_heads, spec, tables, f"{name}.query")
            key = self._rotated(key, spec.num_key_value_heads, spec, tables, f"{name}.key")
        return [
            graph.node("Unsqueeze", [x, graph.shape(0)], f"{name}.{part}.batch")
            for part, x in (("query", query), ("key", key), ("value", value))
        ]

    def _normed_heads(self, x: str, weight: Weight, width: int, norms: HeadNorms, name: str) -> str:
        """`(tokens, heads * head_dim)`, each head normed by itself."""
        graph = self.graph
        heads = graph.node("Reshape", [x, graph.shape(-1, weight.shape[0])], f"{name}.heads")
        weight = replace(weight, dtype=graph.dtype(x))
        normed = self.rms_norm(heads, weight, norms.eps, name)
        return graph.node("Reshape", [normed, graph.shape(-1, width)], f"{name}.rows")

    def _rows_of_tables(self, rows: str) -> tuple[str, str]:
        """cos and sin `(tokens, 1, head_dim / 2)` of a pass's rows, made with the first layer."""
        if self._tables is None:
            graph = self.graph
            total = graph.node("Cast", [contract.TOTAL_LENGTH], "total", {"to": TensorProto.INT64})
            first, one = (graph.constant(np.array(i, np.int64), f"scalar.{i}") for i in (0, 1))
            sizes = graph.node("Shape", [rows], "sizes")
            tokens = graph.node("Gather", [sizes, first], "tokens", {"axis": 0})
            start = graph.node("Sub", [total, tokens], "start")
            positions = graph.node("Range", [start, total, one], "positions")
            cos = self._gathered(contract.ROPE_COS, positions, "cos")
            self._tables = cos, self._gathered(contract.ROPE_SIN, positions, "sin")
        return self._tables

    def _gathered(self, table: str, positions: str, name: str) -> str:
        graph = self.graph
        rows = graph.node("Gather", [table, positions], name, {"axis": 0})
        return graph.node("Unsqueeze", [rows, graph.shape(1)], f"{name}.heads")

    def _rotated(
        self, x: str, heads: int, spec: LanguageSpec, tables: tuple[str, str], name: str
    ) -> str:
        """Rows `(tokens, heads * head_dim)`, the halves a and b of each head turned by the angle:
        `a cos - b sin, b cos + a sin`.
        """
        graph, (cos, sin) = self.graph, tables
        split = graph.node("Reshape", [x, graph.shape(-1, heads, spec.head_dim)], f"{name}.split")
        halves = graph.nodes("Split", [split], f"{name}.halves", 2, {"axis": -1, "num_outputs": 2})
        turned = []
        for op, i in (("Sub", 0), ("Add", 1)):
            straight = graph.node("Mul", [halves[i], cos], f"{name}.cos.{i}")
            crossed = graph.node("Mul", [halves[1 - i], sin], f"{name}.sin.{i}")
            turned.append(graph.node(op, [straight, crossed], f"{name}.turned.{i}"))
        joined = graph.node("Concat", turned, f"{name}.turned", {"axis": -1})
        return graph.node("Reshape", [joined, graph.shape(-1, heads * spec.head_dim)], name)

    def _cache_scales(self, scales: CacheScales, layer: int) -> list[str]:
        """One scale per head and lane, as float32 (1, kv_heads, 1, head_dim)."""
        named = {"key": scales.key, "value": scales.value}
        return [
            self.graph.weight(
                Weight.held(f"cache.{layer}.{part}.scales", values[np.newaxis, :, np.newaxis])
            )
            for part, values in named.items()
        ]


def _part(name: str, index: int, count: int) -> str:
    return f"{name}.{index}" if count > 1 else name
