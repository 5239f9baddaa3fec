"""Qwen2 and 2.5: Llama with biases of query, key and value, and none of the output."""

from __future__ import annotations

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.families.llama import Llama
from internvl_edge.export.checkpoint.section import Section


class Qwen2(Llama):
    """See the module."""

    architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"

    def spec(self, llm: Section) -> LanguageSpec:
        llm.positive("num_key_value_heads")  # the class takes 32 where nothing is said
        spec = read_decoder(llm, Defaults(), qkv_bias=True)
        finish(llm, spec)
        return spec


FAMILY = Qwen2()
