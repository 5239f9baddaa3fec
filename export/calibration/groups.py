"""Which linear layers share an input, and which earlier weights can take up a rescaling of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import LanguageSpec, VisionSpec
from internvl_edge.export.checkpoint.mapping import LANGUAGE, PROJECTOR, VISION
from internvl_edge.export.checkpoint.weights import wqkv_rows


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
    prefix = f"{VISION}.encoder.layers.{layer}"
    width = spec.hidden_size
    value_rows = np.arange(2 * width, 3 * width)
    return [
        Group((f"{prefix}.attn.qkv.weight",), _norm(f"{prefix}.norm1")),
        Group(
            (f"{prefix}.attn.proj.weight",),
            (
                Upstream(f"{prefix}.attn.qkv.weight", value_rows),
                Upstream(f"{prefix}.attn.qkv.bias", value_rows, optional=True),
            ),
        ),
        Group((f"{prefix}.mlp.fc1.weight",), _norm(f"{prefix}.norm2")),
        Group((f"{prefix}.mlp.fc2.weight",)),
    ]


def projector_groups() -> list[Group]:
    return [
        Group((f"{PROJECTOR}.1.weight",), _norm(f"{PROJECTOR}.0")),
        Group((f"{PROJECTOR}.3.weight",)),
    ]


def language_groups(spec: LanguageSpec, layer: int) -> list[Group]:
    prefix = f"{LANGUAGE}.model.layers.{layer}"
    repeats = spec.num_attention_heads // spec.num_key_value_heads
    # Channel (kv head, query head, lane) of wo's input is made by row (kv head, lane) of V.
    rows = wqkv_rows(spec)[-spec.key_value_size :].reshape(-1, 1, spec.head_dim)
    value_rows = np.broadcast_to(rows, (len(rows), repeats, spec.head_dim)).reshape(-1)
    attention, ffn = f"{prefix}.attention", f"{prefix}.feed_forward"
    return [
        Group((f"{attention}.wqkv.weight",), (Upstream(f"{prefix}.attention_norm.weight"),)),
        Group(
            (f"{attention}.wo.weight",),
            (
                Upstream(f"{attention}.wqkv.weight", value_rows),
                Upstream(f"{attention}.wqkv.bias", value_rows, optional=True),
            ),
            tie=(spec.num_key_value_heads, repeats),
        ),
        Group((f"{ffn}.w1.weight", f"{ffn}.w3.weight"), (Upstream(f"{prefix}.ffn_norm.weight"),)),
        # silu(w1 x) * (w3 x) is linear in w3's rows.
        Group((f"{ffn}.w2.weight",), (Upstream(f"{ffn}.w3.weight"),)),
    ]


def head_groups() -> list[Group]:
    return [Group((f"{LANGUAGE}.output.weight",), (Upstream(f"{LANGUAGE}.model.norm.weight"),))]


def _norm(prefix: str) -> tuple[Upstream, ...]:
    return (Upstream(f"{prefix}.weight"), Upstream(f"{prefix}.bias", optional=True))
