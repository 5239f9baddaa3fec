"""Llama: query, key and value in matrices of their own, named as transformers names them."""

from __future__ import annotations

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.family import Family, layered
from internvl_edge.export.checkpoint.names import EMBEDDING, HEAD, NORM
from internvl_edge.export.checkpoint.origin import Table, joined, whole
from internvl_edge.export.checkpoint.section import Section


class Llama(Family):
    """See the module."""

    architectures = ("LlamaForCausalLM",)
    model_type = "llama"

    def spec(self, llm: Section) -> LanguageSpec:
        told = llm.raw("head_dim", None)
        head_size = None if told is None else llm.positive("head_dim")
        bias = llm.flag("attention_bias", False)
        spec = read_decoder(llm, Defaults(), bias=bias, head_size=head_size)
        finish(llm, spec)
        return spec

    def tensors(self, spec: LanguageSpec) -> Table:
        outside = {
            EMBEDDING: whole("model.embed_tokens.weight"),
            NORM: whole("model.norm.weight"),
            HEAD: whole("lm_head.weight"),
        }
        return layered(spec, outside, "model.layers.{}.", self.layer(spec))

    def layer(self, spec: LanguageSpec) -> Table:
        """Return where the tensors of one layer lie, by their names within it."""
        rows = {"q": spec.query_size, "k": spec.key_value_size, "v": spec.key_value_size}
        layer = {
            "attention_norm.weight": whole("input_layernorm.weight"),
            "ffn_norm.weight": whole("post_attention_layernorm.weight"),
        }
        for leaf in ("weight", "bias"):
            parts = {f"self_attn.{part}_proj.{leaf}": count for part, count in rows.items()}
            layer[f"qkv.{leaf}"] = joined(parts)
            layer[f"out.{leaf}"] = whole(f"self_attn.o_proj.{leaf}")
        for name in ("gate", "up", "down"):
            layer[f"{name}.weight"] = whole(f"mlp.{name}_proj.weight")
        return layer


FAMILY = Llama()
