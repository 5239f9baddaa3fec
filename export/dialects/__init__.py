"""How the few things that differ between runtimes are written as ONNX nodes.

The model files know blocks; a dialect knows operators. Values are two-dimensional,
`(rows, width)`, wherever a linear layer or a norm is applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from internvl_edge.export.graph import GraphBuilder
from internvl_edge.export.weights import Weight
from internvl_edge.runtime.specs import LanguageSpec


@dataclass(frozen=True)
class CacheNames:
    """Values the cached attention of one layer reads."""

    layer: int
    past_key: str
    past_value: str
    last_position: str
    total_length: str
    rope_cos: str
    rope_sin: str


@dataclass(frozen=True)
class AttentionShape:
    """Rows that attend to each other, and how their width splits into heads."""

    tokens: int
    heads: int
    width: int


class Dialect(Protocol):
    """Writes blocks into the graph it was made for."""

    graph: GraphBuilder

    def linear(self, x: str, weight: Weight, bias: Weight | None, name: str) -> str:
        """`(rows, in)` -> `(rows, out)`; the weight is `(out, in)`."""

    def layer_norm(self, x: str, weight: Weight, bias: Weight, eps: float, name: str) -> str: ...

    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str: ...

    def add_rms_norm(
        self, x: str, residual: str, weight: Weight, eps: float, name: str
    ) -> tuple[str, str]:
        """The norm of `x + residual`, and the sum itself."""

    def gelu(self, x: str, name: str) -> str:
        """Exact (erf) GELU."""

    def silu(self, x: str, name: str) -> str: ...

    def full_attention(self, qkv: tuple[str, str, str], shape: AttentionShape, name: str) -> str:
        """Bidirectional attention within each run of rows; query, key, value `(rows, width)`."""

    def cached_attention(
        self, qkv: str, cache: CacheNames, spec: LanguageSpec, name: str
    ) -> tuple[str, str, str]:
        """Causal grouped-query attention with rotary positions over a KV cache.

        Args:
            qkv: `(tokens, query_size + 2 * key_value_size)`: all Q, all K, all V.

        Returns:
            `(tokens, query_size)`, present key, present value.
        """
