"""InternLM2: Llama with query, key and value in one matrix, its rows interleaved."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.family import Family, layered
from internvl_edge.export.checkpoint.names import EMBEDDING, HEAD, NORM
from internvl_edge.export.checkpoint.origin import Table, reordered, whole
from internvl_edge.export.checkpoint.section import Section

_DEFAULTS = Defaults(
    sizes={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 103168,
        "max_position_embeddings": 2048,
    },
    rope_theta=10000.0,
)


class InternLM2(Family):
    """See the module."""

    architectures = ("InternLM2ForCausalLM",)

    def spec(self, llm: Section) -> LanguageSpec:
        spec = read_decoder(llm, _DEFAULTS, bias=llm.flag("bias", True))
        llm.only("attention_bias", spec.bias)
        finish(llm, spec)
        return spec

    def tensors(self, spec: LanguageSpec) -> Table:
        rows = wqkv_rows(spec)
        outside = {
            EMBEDDING: whole("model.tok_embeddings.weight"),
            NORM: whole("model.norm.weight"),
            HEAD: whole("output.weight"),
        }
        layer = {
            "attention_norm.weight": whole("attention_norm.weight"),
            "qkv.weight": reordered("attention.wqkv.weight", rows),
            "qkv.bias": reordered("attention.wqkv.bias", rows),
            "out.weight": whole("attention.wo.weight"),
            "out.bias": whole("attention.wo.bias"),
            "ffn_norm.weight": whole("ffn_norm.weight"),
            "gate.weight": whole("feed_forward.w1.weight"),
            "up.weight": whole("feed_forward.w3.weight"),
            "down.weight": whole("feed_forward.w2.weight"),
        }
        return layered(spec, outside, "model.layers.{}.", layer)


def wqkv_rows(spec: LanguageSpec) -> NDArray[np.int64]:
    """Return the row order that turns the interleaved `wqkv` into all Q, all K, all V.

    Stored: per KV group g query heads, one key head, one value head, `head_dim` rows each.
    """
    group = spec.num_attention_heads // spec.num_key_value_heads
    rows = np.arange(spec.query_size + 2 * spec.key_value_size)
    # (kv_heads * (group + 2) * head_dim) -> (kv_heads, group + 2, head_dim)
    blocks = rows.reshape(spec.num_key_value_heads, group + 2, spec.head_dim)
    query, key, value = blocks[:, :group], blocks[:, group], blocks[:, group + 1]
    return np.concatenate([query.reshape(-1), key.reshape(-1), value.reshape(-1)])


FAMILY = InternLM2()
