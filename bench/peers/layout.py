"""The language part under other names: InternLM2 is Llama with a fused `wqkv`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.mapping import LANGUAGE, TOK_EMBEDDINGS
from internvl_edge.export.checkpoint.weights import WeightReader, wqkv_rows


@dataclass(frozen=True)
class Names:
    """How another project calls the tensors.

    Attributes:
        layer: prefix of a layer's tensors, `{}` being its number.
        query_key_value: inside a layer, of the three parts of `wqkv`.
        linears, norms: inside a layer, by the checkpoint's names.
        interleaved: rotation turns lanes 2i and 2i + 1 instead of i and i + d / 2.
    """

    embedding: str
    norm: str
    head: str
    layer: str
    query_key_value: tuple[str, str, str]
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    interleaved: bool


GGUF = Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layer="blk.{}",
    query_key_value=("attn_q", "attn_k", "attn_v"),
    linears={
        "attention.wo": "attn_output",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
    norms={"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"},
    interleaved=True,
)
TRANSFORMERS = Names(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layer="model.layers.{}",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    linears={
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    },
    norms={"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    interleaved=False,
)


@dataclass(frozen=True)
class Tensor:
    """Rows of one of the checkpoint's tensors in an order (None: as stored), under a new name."""

    name: str
    stored: str
    shape: tuple[int, ...]
    rows: NDArray[np.int64] | None = None


def llama_tensors(source: WeightSource, names: Names) -> Iterator[Tensor]:
    """Every tensor of the language part."""

    def whole(name: str, stored: str) -> Tensor:
        return Tensor(name, stored, source.shape(stored))

    spec = source.spec.language
    yield whole(f"{names.embedding}.weight", TOK_EMBEDDINGS)
    yield whole(f"{names.norm}.weight", f"{LANGUAGE}.model.norm.weight")
    yield whole(f"{names.head}.weight", f"{LANGUAGE}.output.weight")
    parts = dict(zip(names.query_key_value, _qkv_rows(spec, names.interleaved), strict=True))
    for layer in range(spec.num_hidden_layers):
        there, here = names.layer.format(layer), f"{LANGUAGE}.model.layers.{layer}"
        for stored, name in {**names.norms, **names.linears}.items():
            yield whole(f"{there}.{name}.weight", f"{here}.{stored}.weight")
        for leaf in ("weight", "bias") if spec.bias else ("weight",):
            fused = f"{here}.attention.wqkv.{leaf}"
            for name, rows in parts.items():
                shape = (len(rows), *source.shape(fused)[1:])
                yield Tensor(f"{there}.{name}.{leaf}", fused, shape, rows)
        if spec.bias:
            wo = "attention.wo"
            yield whole(f"{there}.{names.linears[wo]}.bias", f"{here}.{wo}.bias")


def read_tensor(source: WeightSource, tensor: Tensor, dtype: str) -> NDArray[np.generic]:
    """Its values, whole.

    Args:
        dtype: float32 or float16.

    Raises:
        CheckpointError: a value is NaN or infinite.
        ExportError: a finite value does not fit float16.
    """
    weight = WeightReader(source, dtype).tensor(tensor.stored)
    values = np.concatenate(list(weight.cast_blocks()))
    return values if tensor.rows is None else np.ascontiguousarray(values[tensor.rows])


def interleaved_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Row order that brings lanes i and i + d / 2 of every head side by side."""
    rows = np.arange(heads * head_dim)
    # (heads, half, pair) -> (heads, pair, half)
    return rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _qkv_rows(spec: LanguageSpec, interleaved: bool) -> list[NDArray[np.int64]]:
    """Rows of the stored `wqkv` that make query, key and value."""
    ends = (spec.query_size, spec.query_size + spec.key_value_size)
    query, key, value = np.split(wqkv_rows(spec), ends)
    if interleaved:
        query = query[interleaved_rows(spec.num_attention_heads, spec.head_dim)]
        key = key[interleaved_rows(spec.num_key_value_heads, spec.head_dim)]
    return [query, key, value]
