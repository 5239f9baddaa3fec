"""Phi-3: Llama with query, key and value in one matrix, gate and up in another, and longrope."""

from __future__ import annotations

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.families.llama import Llama
from internvl_edge.export.checkpoint.origin import Table, cut, whole
from internvl_edge.export.checkpoint.section import Section

_DEFAULTS = Defaults(rms_norm_eps=1e-5, rope_theta=10000.0)


class Phi3(Llama):
    """See the module."""

    architectures = ("Phi3ForCausalLM",)
    model_type = "phi3"

    def spec(self, llm: Section) -> LanguageSpec:
        spec = read_decoder(llm, _DEFAULTS)
        llm.only("attention_bias", False)
        finish(llm, spec)
        return spec

    def layer(self, spec: LanguageSpec) -> Table:
        rows = spec.intermediate_size
        return super().layer(spec) | {
            "qkv.weight": whole("self_attn.qkv_proj.weight"),
            "gate.weight": cut("mlp.gate_up_proj.weight", 0, rows),
            "up.weight": cut("mlp.gate_up_proj.weight", rows, 2 * rows),
        }


FAMILY = Phi3()
