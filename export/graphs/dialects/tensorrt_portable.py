"""TensorRT 10.3 (JetPack 6.1 and 6.2): the same mathematics in operators its parser knows.

The cache is an input only: a pass reads it, and gives out the new rows alone, for the runtime to
put behind the others. Scores against cached and new keys meet in one softmax, so nothing of the
cache is copied.

An int8 cache holds `key / scale` and `value / scale` with one scale per head and lane. The scales
of keys multiply the queries and those of values the result, which is the same sum, so that
quantising takes the one scale of a tensor TensorRT knows for activations: 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.formats.quantize import Floats
from internvl_edge.export.graphs.dialects import AttentionShape, CacheNames
from internvl_edge.export.graphs.dialects.tensorrt import TensorRtDialect
from internvl_edge.export.graphs.graph import GraphBuilder

#: The newest opset TensorRT 10.3's documentation names; see `BLOCK_OPSET` for the exception.
OPSET = 20


@dataclass(frozen=True)
class Step:
    """What all layers' attention reads.

    Attributes:
        cos: `(sequences, 1, tokens, head_dim / 2)` of the rows' positions.
        sin: the same.
        past_mask: bool `(sequences, 1, 1, keys)`: which cached keys are older than the rows.
        new_mask: bool `(sequences, 1, group * tokens, tokens)`: which of the rows a row of one KV
            head sees.
        keys: int64 `(1,)`: how much of the caches is read.
    """

    cos: str
    sin: str
    past_mask: str
    new_mask: str
    keys: str


class PortableDialect(TensorRtDialect):
    """See `Dialect`."""

    name: DialectName = "tensorrt-portable"

    def __init__(self, graph: GraphBuilder, plan: QuantPlan, dtype: str) -> None:
        super().__init__(graph, plan, dtype)
        graph.opset = OPSET
        self._step: Step | None = None

    def gelu(self, x: str, name: str) -> str:
        """`x / 2 * (1 + erf(x / sqrt 2))`"""
        graph = self.graph
        x = graph.cast(x, "float32", f"{name}.wide")
        scaled = self._times(x, 0.5**0.5, f"{name}.scaled")
        erf = graph.node("Erf", [scaled], f"{name}.erf")
        shifted = graph.node("Add", [erf, self._number(1, "float32")], f"{name}.shifted")
        return graph.node("Mul", [self._times(x, 0.5, f"{name}.half"), shifted], name)

    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str:
        """`x / sqrt(mean(x^2) + eps) * weight`"""
        graph = self.graph
        x = graph.cast(x, "float32", f"{name}.wide")
        square = graph.node("Mul", [x, x], f"{name}.square")
        # ReduceMean's axes became an input the parser does not read: it would take them all.
        total = graph.node("ReduceSum", [square, graph.shape(-1)], f"{name}.total", {"keepdims": 1})
        mean = self._times(total, 1 / weight.shape[0], f"{name}.mean")
        raised = graph.node("Add", [mean, self._number(eps, "float32")], f"{name}.raised")
        root = graph.node("Sqrt", [raised], f"{name}.root")
        normed = graph.node("Div", [x, root], f"{name}.normed")
        scale = graph.weight(replace(weight, dtype="float32"))
        scaled = graph.node("Mul", [normed, scale], name)
        return graph.cast(scaled, self.dtype, f"{name}.cast")

    def full_attention(self, qkv: tuple[str, str, str], shape: AttentionShape, name: str) -> str:
        """Products and softmax in the graph's dtype, the pattern TensorRT fuses: scores of scaled
        queries are far from float16's end, and a softmax never leaves 0..1.
        """
        graph, head_dim = self.graph, shape.width // shape.heads
        split = graph.shape(-1, shape.tokens, shape.heads, head_dim)
        perms = {"query": [0, 2, 1, 3], "key": [0, 2, 3, 1], "value": [0, 2, 1, 3]}
        folded = []
        for x, (part, perm) in zip(qkv, perms.items(), strict=True):
            x = graph.cast(x, self.dtype, f"{name}.{part}.cast")
            x = graph.node("Reshape", [x, split], f"{name}.{part}.split")
            folded.append(graph.node("Transpose", [x], f"{name}.{part}", {"perm": perm}))
        query, key, value = folded
        query = self._times(query, head_dim**-0.5, f"{name}.query.scaled")
        scores = graph.node("MatMul", [query, key], f"{name}.scores")
        shares = graph.node("Softmax", [scores], f"{name}.shares", {"axis": -1})
        return self.rows(graph.node("MatMul", [shares, value], name), shape.width, name)

    def cached_attention(
        self, qkv: str, cache: CacheNames, spec: LanguageSpec, name: str
    ) -> tuple[str, str, str]:
        graph, step = self.graph, self._step or self._begin(spec)
        parts = self.split_heads(qkv, cache.norms, spec, name)
        heads, kv_heads, width = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        query = self._rotated(parts[0], heads, width, step, f"{name}.query")
        query = self._times(query, width**-0.5, f"{name}.query.scaled")
        key = self._rotated(parts[1], kv_heads, width, step, f"{name}.key")
        value = self.heads(parts[2], kv_heads, width, f"{name}.value")
        scales, group = self.plan.cache.get(cache.layer), heads // kv_heads
        if scales is not None:
            stored = f"cache.{cache.layer}"
            factors = Weight.held(f"{stored}.query", np.repeat(scales.key, group, axis=0))
            query = self._lanes(query, factors, self.dtype, f"{name}.query.lanes")
            key = self._cached_rows(key, f"{stored}.key", scales.key, f"{name}.key")
            value = self._cached_rows(value, f"{stored}.value", scales.value, f"{name}.value")
        past = tuple(
            graph.node("Slice", [x, graph.shape(0), step.keys, graph.shape(2)], f"{name}.{part}")
            for x, part in ((cache.past_key, "past_key"), (cache.past_value, "past_value"))
        )
        # (sequences, heads, tokens, head_dim) -> (sequences, kv_heads, group * tokens, head_dim):
        # each KV head is read once for all the queries that share it.
        query = graph.node(
            "Reshape", [query, self.of_sequences(kv_heads, -1, width)], f"{name}.groups"
        )
        y = self._attend(query, past, (key, value), step, name)
        y = graph.node("Reshape", [y, self.of_sequences(heads, -1, width)], f"{name}.heads")
        if scales is not None:
            factors = Weight.held(f"{stored}.attended", np.repeat(scales.value, group, axis=0))
            y = self._lanes(y, factors, self.dtype, f"{name}.lanes")
        return self.rows(y, spec.query_size, name), key, value

    def _attend(
        self, query: str, past: Sequence[str], new: Sequence[str], step: Step, name: str
    ) -> str:
        """One softmax over two runs of keys and values, in float32 for its masks and sums."""
        graph = self.graph
        scores = []
        for keys, mask, part in (
            (past[0], step.past_mask, "past"),
            (new[0], step.new_mask, "new"),
        ):
            turned = graph.node("Transpose", [keys], f"{name}.{part}.keys", {"perm": [0, 1, 3, 2]})
            turned = self._read(turned, f"{name}.{part}.keys.read")
            score = graph.node("MatMul", [query, turned], f"{name}.{part}.scores")
            score = graph.cast(score, "float32", f"{name}.{part}.wide")
            never = self._number(float(np.finfo(np.float32).min), "float32")
            scores.append(graph.node("Where", [mask, score, never], f"{name}.{part}.masked"))
        # (sequences, kv_heads, group * tokens, keys + tokens)
        joined = graph.node("Concat", scores, f"{name}.scores", {"axis": -1})
        shares = graph.node("Softmax", [joined], f"{name}.shares", {"axis": -1})
        shares = graph.cast(shares, self.dtype, f"{name}.shares.cast")
        last, start, end = graph.shape(3), graph.shape(0), graph.shape(np.iinfo(np.int64).max)
        old = graph.node("Slice", [shares, start, step.keys, last], f"{name}.past.shares")
        fresh = graph.node("Slice", [shares, step.keys, end, last], f"{name}.new.shares")
        values = (
            self._read(past[1], f"{name}.past.values"),
            self._read(new[1], f"{name}.new.values"),
        )
        old = graph.node("MatMul", [old, values[0]], f"{name}.past")
        fresh = graph.node("MatMul", [fresh, values[1]], f"{name}.new")
        return graph.node("Add", [old, fresh], name)

    def _begin(self, spec: LanguageSpec) -> Step:
        """Made with the first layer, read by all."""
        graph, rows, keys = self.graph, contract.POSITIONS, contract.KEY_POSITIONS
        first, second = graph.shape(0), graph.shape(1)
        begin = graph.node("Slice", [rows, first, second, second], "begin")
        begin = graph.node("Unsqueeze", [begin, graph.shape(2, 3)], "mask.begin")
        column = graph.node("Unsqueeze", [keys, graph.shape(0, 1, 2)], "mask.keys")
        group = graph.shape(1, spec.num_attention_heads // spec.num_key_value_heads)
        tiled = graph.node("Tile", [rows, group], "mask.tiled")  # (sequences, group * tokens)
        row = graph.node("Unsqueeze", [tiled, graph.shape(1, 3)], "mask.rows")
        other = graph.node("Unsqueeze", [rows, graph.shape(1, 2)], "mask.columns")
        cos, sin = (
            graph.node("Unsqueeze", [self.rotary_rows(table, name), second], f"{name}.rows")
            for table, name in ((contract.ROPE_COS, "cos"), (contract.ROPE_SIN, "sin"))
        )
        self._step = Step(
            cos=cos,
            sin=sin,
            past_mask=graph.node("Less", [column, begin], "mask.past"),
            new_mask=graph.node("LessOrEqual", [other, row], "mask.new"),
            keys=graph.node("Shape", [keys], "keys"),
        )
        return self._step

    def _rotated(self, x: str, heads: int, width: int, step: Step, name: str) -> str:
        """Rows -> `(sequences, heads, tokens, head_dim)`, its halves a and b turned by the angle:
        `a cos - b sin, b cos + a sin`.
        """
        graph = self.graph
        x = self.heads(x, heads, width, name)
        halves = graph.nodes("Split", [x], f"{name}.halves", 2, {"axis": -1, "num_outputs": 2})
        turned = []
        for op, i in (("Sub", 0), ("Add", 1)):
            straight = graph.node("Mul", [halves[i], step.cos], f"{name}.cos.{i}")
            crossed = graph.node("Mul", [halves[1 - i], step.sin], f"{name}.sin.{i}")
            turned.append(graph.node(op, [straight, crossed], f"{name}.turned.{i}"))
        return graph.node("Concat", turned, f"{name}.rotated", {"axis": -1})

    def _cached_rows(self, x: str, stored: str, scales: Floats, name: str) -> str:
        """int8 `x / scale`; in float32, for lanes that are all but zero have a scale as small."""
        x = self._lanes(x, Weight.held(stored, 1 / scales), "float32", f"{name}.lanes")
        inputs = [x, self._number(1, "float32"), self._zero()]
        return self.graph.node("QuantizeLinear", inputs, f"{name}.quantized")

    def _read(self, x: str, name: str) -> str:
        """Keys or values in the graph's dtype."""
        if self.graph.dtype(x) != "int8":
            return x
        inputs = [x, self._number(1, self.dtype), self._zero()]
        return self.graph.node("DequantizeLinear", inputs, name)

    def _lanes(self, x: str, factors: Weight, dtype: str, name: str) -> str:
        """`(sequences, heads, tokens, head_dim)` times float32 `(heads, head_dim)`, rounded to
        `dtype`."""
        graph = self.graph
        wide = graph.cast(x, "float32", f"{name}.wide")
        shape = (1, factors.shape[0], 1, factors.shape[1])
        lanes = Weight(factors.name, factors.dtype, shape, factors.blocks)
        scaled = graph.node("Mul", [wide, graph.weight(lanes)], name)
        return graph.cast(scaled, dtype, f"{name}.cast")

    def _times(self, x: str, factor: float, name: str) -> str:
        return self.graph.node("Mul", [x, self._number(factor, self.graph.dtype(x))], name)

    def _number(self, value: float, dtype: str) -> str:
        return self.graph.constant(np.array(value, dtype), f"{dtype}.{value:.8g}")

    def _zero(self) -> str:
        return self.graph.constant(np.zeros((), np.int8), "zero_point")
