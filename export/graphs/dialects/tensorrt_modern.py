"""TensorRT 10.15 and later (11, RTX, JetPack 7.2): attention and cache as ONNX operators.

Attention is opset 24's with an explicit boolean mask and `is_causal=0`. TensorRT's parser drops the
operator's `nonpad_kv_seqlen` without a word and aligns `is_causal=1` with the first key, so that a
decode step would see key 0 only; a mask leaves nothing to read in two ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.graphs.dialects import AttentionShape, CacheNames
from internvl_edge.export.graphs.dialects.tensorrt import TensorRtDialect
from internvl_edge.export.graphs.graph import GraphBuilder

OPSET = 24


@dataclass(frozen=True)
class Step:
    """What all layers' attention reads.

    Attributes:
        mask: bool `(sequences, 1, tokens, keys)`: which keys a row sees.
        start: int64 `(sequences,)`: where the rows go in the caches.
        keys: int64 `(1,)`: how much of the caches is read.
        cos: `(sequences, tokens, head_dim / 2)` of the rows' positions.
        sin: the same.
    """

    mask: str
    start: str
    keys: str
    cos: str
    sin: str


class ModernDialect(TensorRtDialect):
    """See `Dialect`."""

    name: DialectName = "tensorrt"

    def __init__(self, graph: GraphBuilder, plan: QuantPlan, dtype: str) -> None:
        super().__init__(graph, plan, dtype)
        graph.opset = OPSET
        self._step: Step | None = None

    def gelu(self, x: str, name: str) -> str:
        wide = self.graph.cast(x, "float32", f"{name}.wide")
        return self.graph.node("Gelu", [wide], name, {"approximate": "none"})

    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str:
        graph = self.graph
        wide = graph.cast(x, "float32", f"{name}.wide")
        scale = graph.weight(replace(weight, dtype="float32"))
        normed = graph.node(
            "RMSNormalization", [wide, scale], name, {"axis": -1, "epsilon": eps, "stash_type": 1}
        )
        return graph.cast(normed, self.dtype, f"{name}.cast")

    def full_attention(self, qkv: tuple[str, str, str], shape: AttentionShape, name: str) -> str:
        graph = self.graph
        # (tiles * tokens, width) -> (tiles, tokens, width)
        batched = graph.shape(-1, shape.tokens, shape.width)
        folded = []
        for x, part in zip(qkv, ("query", "key", "value"), strict=True):
            x = graph.cast(x, self.dtype, f"{name}.{part}.cast")
            folded.append(graph.node("Reshape", [x, batched], f"{name}.{part}"))
        heads = {"q_num_heads": shape.heads, "kv_num_heads": shape.heads}
        attended = graph.node("Attention", folded, name, heads | {"is_causal": 0})
        return graph.node("Reshape", [attended, graph.shape(-1, shape.width)], f"{name}.rows")

    def cached_attention(
        self, qkv: str, cache: CacheNames, spec: LanguageSpec, name: str
    ) -> tuple[str, str, str]:
        graph, step = self.graph, self._step or self._begin()
        query, key, value = self.split_heads(qkv, cache.norms, spec, name)
        heads, kv_heads, width = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        query = self._rotated(query, heads, width, step, f"{name}.query")
        key = self._rotated(key, kv_heads, width, step, f"{name}.key")
        value = self.heads(value, kv_heads, width, f"{name}.value")
        # The cache is the graph's input and the result its output: TensorRT writes in place.
        keys, values = (
            graph.node("TensorScatter", [past, new, step.start], f"{name}.present_{part}", _LINEAR)
            for past, new, part in (
                (cache.past_key, key, "key"),
                (cache.past_value, value, "value"),
            )
        )
        read = [
            graph.node(
                "Slice", [x, graph.shape(0), step.keys, graph.shape(2)], f"{name}.read_{part}"
            )
            for x, part in ((keys, "key"), (values, "value"))
        ]
        attended = self.masked_attention([query, *read], step, name)
        return self.rows(attended, spec.query_size, name), keys, values

    def masked_attention(self, qkv: Sequence[str], step: Step, name: str) -> str:
        """Query `(sequences, heads, tokens, head_dim)`, key and value `(sequences, kv_heads, keys,
        head_dim)`."""
        return self.graph.node("Attention", [*qkv, step.mask], name, {"is_causal": 0})

    def _rotated(self, x: str, heads: int, width: int, step: Step, name: str) -> str:
        """Rows -> `(sequences, heads, tokens, head_dim)`, its halves turned by the position's
        angle."""
        x = self.heads(x, heads, width, name)
        return self.graph.node("RotaryEmbedding", [x, step.cos, step.sin], f"{name}.rotated")

    def _begin(self) -> Step:
        """Made with the first layer, read by all."""
        graph, rows, keys = self.graph, contract.POSITIONS, contract.KEY_POSITIONS
        first, second = graph.shape(0), graph.shape(1)
        row = graph.node("Unsqueeze", [rows, graph.shape(1, 3)], "mask.rows")
        column = graph.node("Unsqueeze", [keys, graph.shape(0, 1, 2)], "mask.keys")
        begin = graph.node("Slice", [rows, first, second, second], "begin")
        self._step = Step(
            mask=graph.node("LessOrEqual", [column, row], "mask"),
            start=graph.node("Squeeze", [begin, second], "start"),
            keys=graph.node("Shape", [keys], "keys"),
            cos=self.rotary_rows(contract.ROPE_COS, "cos"),
            sin=self.rotary_rows(contract.ROPE_SIN, "sin"),
        )
        return self._step


_LINEAR = {"axis": -2, "mode": "linear"}
