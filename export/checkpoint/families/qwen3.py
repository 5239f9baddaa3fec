"""Qwen3: Llama with a head size of its own, and the heads of queries and keys normed."""

from __future__ import annotations

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.families.llama import Llama
from internvl_edge.export.checkpoint.origin import Table, whole
from internvl_edge.export.checkpoint.section import Section

#: Of transformers' class where a config has none.
_HEAD_DIM = 128


class Qwen3(Llama):
    """See the module."""

    architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"

    def spec(self, llm: Section) -> LanguageSpec:
        llm.positive("num_key_value_heads")  # the class takes 32 where nothing is said
        bias, head_size = llm.flag("attention_bias", False), llm.positive("head_dim", _HEAD_DIM)
        spec = read_decoder(llm, Defaults(), bias=bias, head_size=head_size, qk_norm=True)
        finish(llm, spec)
        return spec

    def layer(self, spec: LanguageSpec) -> Table:
        norms = {f"{x}_norm.weight": whole(f"self_attn.{x}_norm.weight") for x in ("q", "k")}
        return super().layer(spec) | norms


FAMILY = Qwen3()
