"""Which linear layers share an input, and which earlier weights can take up a rescaling of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import LanguageSpec, VisionSpec
from internvl_edge.export.checkpoint.names import (
    HEAD,
    NORM,
    PROJECTOR,
    decoder_prefix,
    encoder_prefix,
)


@dataclass(frozen=True)
class Upstream:
    """A tensor whose rows make the input.

    Attributes:
        rows: the row that makes channel i, for each i; None for row i itself.
        optional: not every checkpoint has the tensor (a bias).
    """

    name: str
    rows: NDArray[np.int64] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same values.

    Attributes:
        linears: names of their weights; statistics are kept under the first.
        upstream: tensors that can be divided by the factors; empty where only an explicit
            multiplication could (behind a GELU).
        tie: see `search`.
    """

    linears: tuple[str, ...]
    upstream: tuple[Upstream, ...] = ()
    tie: tuple[int, int] = (1, 1)


def vision_groups(spec: VisionSpec, layer: int) -> list[Group]:
    prefix = encoder_prefix(layer)
    width = spec.hidden_size
    value_rows = np.arange(2 * width, 3 * width)
    return [
        Group((f"{prefix}qkv.weight",), _norm(f"{prefix}norm1")),
        Group(
            (f"{prefix}proj.weight",),
            (
                Upstream(f"{prefix}qkv.weight", value_rows),
                Upstream(f"{prefix}qkv.bias", value_rows, optional=True),
            ),
        ),
        Group((f"{prefix}fc1.weight",), _norm(f"{prefix}norm2")),
        Group((f"{prefix}fc2.weight",)),
    ]


def projector_groups() -> list[Group]:
    return [
        Group((f"{PROJECTOR}fc1.weight",), _norm(f"{PROJECTOR}norm")),
        Group((f"{PROJECTOR}fc2.weight",)),
    ]


def language_groups(spec: LanguageSpec, layer: int) -> list[Group]:
    prefix = decoder_prefix(layer)
    repeats = spec.num_attention_heads // spec.num_key_value_heads
    # Channel (kv head, query head, lane) of the output's input is made by row (kv head, lane) of V.
    first = spec.query_size + spec.key_value_size
    rows = np.arange(first, first + spec.key_value_size).reshape(-1, 1, spec.head_dim)
    value_rows = np.broadcast_to(rows, (len(rows), repeats, spec.head_dim)).reshape(-1)
    attention = [
        Group((f"{prefix}qkv.weight",), (Upstream(f"{prefix}attention_norm.weight"),)),
        Group(
            (f"{prefix}out.weight",),
            (
                Upstream(f"{prefix}qkv.weight", value_rows),
                Upstream(f"{prefix}qkv.bias", value_rows, optional=True),
            ),
            tie=(spec.num_key_value_heads, repeats),
        ),
    ]
    if spec.has_experts(layer):  # one operator; see `ExpertInputs`
        return attention
    gate, up, down = (f"{prefix}{name}.weight" for name in ("gate", "up", "down"))
    return [
        *attention,
        Group((gate, up), (Upstream(f"{prefix}ffn_norm.weight"),)),
        # silu(gate x) * (up x) is linear in up's rows.
        Group((down,), (Upstream(up),)),
    ]


def head_groups() -> list[Group]:
    return [Group((HEAD,), (Upstream(NORM),))]


def _norm(prefix: str) -> tuple[Upstream, ...]:
    return (Upstream(f"{prefix}.weight"), Upstream(f"{prefix}.bias", optional=True))
