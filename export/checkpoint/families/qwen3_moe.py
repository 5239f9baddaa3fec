"""Qwen3 with experts: each token goes through some of many MLPs, as a router says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.decoder import Defaults, finish, read_decoder
from internvl_edge.export.checkpoint.families.qwen3 import Qwen3
from internvl_edge.export.checkpoint.origin import Origin, Rows, Table, joined, whole
from internvl_edge.export.checkpoint.section import Section


class Qwen3Moe(Qwen3):
    """See the module."""

    architectures = ("Qwen3MoeForCausalLM",)
    model_type = "qwen3_moe"

    def spec(self, llm: Section) -> LanguageSpec:
        llm.positive("num_key_value_heads")  # the class takes 4 where nothing is said
        told = llm.raw("head_dim", None)
        head_size = None if told is None else llm.positive("head_dim")
        bias = llm.flag("attention_bias", False)
        spec = read_decoder(
            llm,
            Defaults(),
            bias=bias,
            head_size=head_size,
            qk_norm=True,
            mlp_key="moe_intermediate_size",
        )
        # transformers 5 has another name for it.
        key = "num_experts" if llm.raw("num_experts", None) is not None else "num_local_experts"
        dense = _dense_layers(llm, spec.num_hidden_layers)
        spec = replace(
            spec,
            dense_layers=dense,
            dense_size=llm.positive("intermediate_size") if dense else None,
            experts=llm.positive(key),
            experts_per_token=llm.positive("num_experts_per_tok"),
            experts_normed=llm.flag("norm_topk_prob", False),
        )
        llm.raw("intermediate_size", None)  # of no effect where all layers have experts
        finish(llm, spec)
        return spec

    def layer(self, spec: LanguageSpec) -> Table:
        rows, experts = spec.intermediate_size, range(spec.experts or 0)
        gated = [f"mlp.experts.{e}.{x}_proj.weight" for e in experts for x in ("gate", "up")]
        down = [f"mlp.experts.{e}.down_proj.weight" for e in experts]
        in_turns = np.arange(2 * rows).reshape(2, rows).T.reshape(-1)
        return super().layer(spec) | {
            "router.weight": whole("mlp.gate.weight"),
            "experts_gated.weight": Origin(tuple(Rows(x, 0, rows) for x in gated), in_turns),
            "experts_down.weight": joined(dict.fromkeys(down, spec.hidden_size)),
        }


def _dense_layers(llm: Section, layers: int) -> tuple[int, ...]:
    """Return the layers without experts, counted from 1."""
    named = llm.raw("mlp_only_layers", None) or []
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise llm.bad("mlp_only_layers", named, "a list of layers")
    step = llm.positive("decoder_sparse_step", 1)
    return tuple(n for n in range(1, layers + 1) if n - 1 in named or n % step)


FAMILY = Qwen3Moe()
