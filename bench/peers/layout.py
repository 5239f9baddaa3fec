"""The language part under the names other projects give it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import LimitError
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import EMBEDDING, HEAD, NORM, decoder_prefix
from internvl_edge.export.checkpoint.weights import WeightReader

#: Decoders that peers know by the same names.
Kind = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True)
class Names:
    """How another project calls the tensors.

    Attributes:
        layer: prefix of a layer's tensors, `{}` being its number.
        query_key_value: inside a layer, of the three parts of `qkv`.
        linears, norms: inside a layer, by canonical name.
        interleaved: kinds of decoders whose rotation turns lanes 2i and 2i + 1 instead of i and
            i + d / 2.
    """

    embedding: str
    norm: str
    head: str
    layer: str
    query_key_value: tuple[str, str, str]
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    interleaved: tuple[Kind, ...] = ()


GGUF = Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layer="blk.{}",
    query_key_value=("attn_q", "attn_k", "attn_v"),
    linears={
        "out": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    },
    norms={
        "attention_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    },
    interleaved=("llama",),
)
TRANSFORMERS = Names(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layer="model.layers.{}",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    linears={
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms={
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    },
)


def peer_kind(spec: LanguageSpec) -> Kind:
    """Return what peers call a decoder of this kind.

    Raises:
        LimitError: it has something of two kinds, or what peers' files do not express here.
    """
    if spec.rope_frequencies:
        raise LimitError(
            f"peers are not given a rotary embedding of the type {spec.rope_type}; compare another"
            " model"
        )
    if spec.experts is not None:
        raise LimitError("peers are not given a decoder with experts")
    if spec.qk_norm and (spec.bias or spec.qkv_bias):
        raise LimitError("peers are not given a decoder with normed heads and biases")
    return "qwen3" if spec.qk_norm else "qwen2" if spec.qkv_bias else "llama"


@dataclass(frozen=True)
class Tensor:
    """Rows of one of the model's tensors in an order (None: as they are), under a new name."""

    name: str
    ours: str
    shape: tuple[int, ...]
    rows: NDArray[np.int64] | None = None


def llama_tensors(source: WeightSource, names: Names) -> Iterator[Tensor]:
    """Every tensor of the language part.

    Raises:
        LimitError: see `peer_kind`.
    """

    def whole(name: str, ours: str) -> Tensor:
        return Tensor(name, ours, source.shape(ours))

    spec = source.spec.language
    yield whole(f"{names.embedding}.weight", EMBEDDING)
    yield whole(f"{names.norm}.weight", NORM)
    yield whole(f"{names.head}.weight", HEAD)
    interleaved = peer_kind(spec) in names.interleaved
    parts = dict(zip(names.query_key_value, _qkv_rows(spec, interleaved), strict=True))
    norms = {ours: name for ours, name in names.norms.items() if spec.qk_norm or ours[1] != "_"}
    for layer in range(spec.num_hidden_layers):
        there, here = names.layer.format(layer), decoder_prefix(layer)
        for ours, name in {**norms, **names.linears}.items():
            yield whole(f"{there}.{name}.weight", f"{here}{ours}.weight")
        for leaf in ("weight", "bias") if spec.has_qkv_bias else ("weight",):
            fused = f"{here}qkv.{leaf}"
            for name, rows in parts.items():
                shape = (len(rows), *source.shape(fused)[1:])
                yield Tensor(f"{there}.{name}.{leaf}", fused, shape, rows)
        if spec.bias:
            yield whole(f"{there}.{names.linears['out']}.bias", f"{here}out.bias")


def read_tensor(source: WeightSource, tensor: Tensor, dtype: str) -> NDArray[np.generic]:
    """Its values, whole.

    Args:
        dtype: float32 or float16.

    Raises:
        CheckpointError: a value is NaN or infinite.
        RangeError: a finite value does not fit float16.
    """
    weight = WeightReader(source, dtype).tensor(tensor.ours)
    values = np.concatenate(list(weight.cast_blocks()))
    return values if tensor.rows is None else np.ascontiguousarray(values[tensor.rows])


def interleaved_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Row order that brings lanes i and i + d / 2 of every head side by side."""
    rows = np.arange(heads * head_dim)
    # (heads, half, pair) -> (heads, pair, half)
    return rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _qkv_rows(spec: LanguageSpec, interleaved: bool) -> list[NDArray[np.int64]]:
    """Rows of `qkv` that make query, key and value."""
    ends = (spec.query_size, spec.query_size + spec.key_value_size)
    query, key, value = np.split(np.arange(ends[1] + spec.key_value_size), ends)
    if interleaved:
        query = query[interleaved_rows(spec.num_attention_heads, spec.head_dim)]
        key = key[interleaved_rows(spec.num_key_value_heads, spec.head_dim)]
    return [query, key, value]
