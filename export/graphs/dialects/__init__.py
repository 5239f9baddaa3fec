"""How the few things that differ between runtimes are written as ONNX nodes.

The model files know blocks; a dialect knows operators. Values are two-dimensional,
`(rows, width)`, wherever a linear layer or a norm is applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.graphs.graph import GraphBuilder


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each head of queries and keys, before they are rotated; weights `(head_dim,)`."""

    query: Weight
    key: Weight
    eps: float


@dataclass(frozen=True)
class CacheNames:
    """Values the cached attention of one layer reads; what all layers read is the contract's.

    Attributes:
        norms: of the heads, where the decoder has them.
    """

    layer: int
    past_key: str
    past_value: str
    norms: HeadNorms | None = None


@dataclass(frozen=True)
class AttentionShape:
    """Rows that attend to each other, and how their width splits into heads."""

    tokens: int
    heads: int
    width: int


@dataclass(frozen=True)
class Linear:
    """A linear layer's tensors and its node's name: the arguments of `Dialect.linear`."""

    weight: Weight
    bias: Weight | None
    name: str
    gain: Weight | None = None


@dataclass(frozen=True)
class Experts:
    """The MLPs of one layer, and what chooses between them.

    Attributes:
        router: `(experts, hidden)`.
        gated: `(experts * 2 * width, hidden)`: of each, rows of gate and up in turns.
        down: `(experts * hidden, width)`.
        per_token: how many a token goes through.
        normed: whether their shares add up to one.
    """

    router: Weight
    gated: Weight
    down: Weight
    per_token: int
    normed: bool


class Dialect(Protocol):
    """Writes blocks into the graph it was made for."""

    name: DialectName
    graph: GraphBuilder

    def linear(
        self, x: str, weight: Weight, bias: Weight | None, name: str, gain: Weight | None = None
    ) -> str:
        """`(rows, in)` -> `(rows, out)`; the weight is `(out, in)`.

        Args:
            gain: `(out,)`, multiplies the result, bias included (LayerScale).
        """

    def split_linear(
        self, x: str, weight: Weight, bias: Weight | None, parts: int, name: str
    ) -> list[str]:
        """Like `linear`, the result's columns in `parts` equal runs."""

    def gelu_mlp(self, x: str, up: Linear, down: Linear) -> str:
        """`up`, exact (erf) GELU, `down`: one method, for its middle is the widest value of all."""

    def layer_norm(self, x: str, weight: Weight, bias: Weight, eps: float, name: str) -> str: ...

    def rms_norm(self, x: str, weight: Weight, eps: float, name: str) -> str: ...

    def add_rms_norm(
        self, x: str, residual: str, weight: Weight, eps: float, name: str
    ) -> tuple[str, str]:
        """The norm of `x + residual`, and the sum itself."""

    def gated_silu(self, gate: str, up: str, name: str) -> str:
        """`silu(gate) * up`"""

    def mixture(self, x: str, experts: Experts, name: str) -> str:
        """Of each row the MLPs the router gives most, weighted by its softmax over all.

        Raises:
            ExportError: the dialect or the precision has no such operator.
        """

    def add(self, x: str, y: str, name: str) -> str:
        """The sum of a residual stream and what is added to it."""

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
