"""InternLM3: Llama with a head size of its own, and keys of its own for the biases."""

from __future__ import annotations

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.families.llama import Llama
from internvl_edge.export.checkpoint.section import Section

_DEFAULTS = Defaults(rms_norm_eps=1e-5)
#: Of transformers' class where a config has none; null is the share of one head.
_HEAD_DIM = 128


class InternLM3(Llama):
    """See the module."""

    architectures = ("InternLM3ForCausalLM",)
    model_type = "internlm3"

    def spec(self, llm: Section) -> LanguageSpec:
        llm.positive("num_key_value_heads")  # the class takes 2 where nothing is said
        shared = llm.raw("head_dim", _HEAD_DIM) is None
        head_size = None if shared else llm.positive("head_dim", _HEAD_DIM)
        qkv_bias = llm.flag("qkv_bias", False)
        spec = read_decoder(llm, _DEFAULTS, qkv_bias=qkv_bias, head_size=head_size)
        llm.only("attention_bias", qkv_bias)  # transformers' name of it
        llm.only("bias", False)  # would be of the output's projection and of the MLP
        finish(llm, spec)
        return spec


FAMILY = InternLM3()
