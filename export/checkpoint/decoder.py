"""What the configs of all decoder families share: sizes, rotary embedding, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from internvl_edge.bundle.specs import MAX_LAYERS, LanguageSpec
from internvl_edge.export.checkpoint import config_keys
from internvl_edge.export.checkpoint.rotary import Rope, read_rope
from internvl_edge.export.checkpoint.section import REQUIRED, Section


@dataclass(frozen=True)
class Defaults:
    """What transformers takes where a config says nothing; what is not here has to be said.

    Attributes:
        sizes: by key. `num_key_value_heads` is that of the query heads where it is not here.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None


def read_decoder(
    llm: Section,
    defaults: Defaults,
    *,
    bias: bool = False,
    qkv_bias: bool = False,
    head_size: int | None = None,
    qk_norm: bool = False,
    mlp_key: str = "intermediate_size",
) -> LanguageSpec:
    """Read what all decoders have; `finish` follows, when a family has read its own keys.

    Args:
        bias: whether all of attention's projections have one.
        qkv_bias: whether query, key and value have one and the output has none.
        head_size: where it does not follow from the other sizes.
        qk_norm: whether the heads of queries and keys are normed before they are rotated.
        mlp_key: tells the width of the MLP, or of an expert.

    Raises:
        CheckpointError: a key is missing or malformed.
    """
    llm.one_of("hidden_act", ("silu",), "silu")

    def size(key: str) -> int:
        return llm.positive(key, defaults.sizes.get(key, REQUIRED))

    heads = size("num_attention_heads")
    kv_heads = heads if llm.raw("num_key_value_heads", None) is None else None
    rope = read_rope(llm)
    theta = defaults.rope_theta if rope.theta is None else rope.theta
    spec = LanguageSpec(
        hidden_size=size("hidden_size"),
        intermediate_size=size(mlp_key),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or llm.positive("num_key_value_heads"),
        vocab_size=size("vocab_size"),
        rms_norm_eps=llm.number("rms_norm_eps", defaults.rms_norm_eps),
        bias=bias,
        max_position_embeddings=size("max_position_embeddings"),
        rope_theta=llm.number("rope_theta") if theta is None else theta,
        rope_type=rope.kind,
        rope_factor=rope.factor,
        qkv_bias=qkv_bias,
        head_size=head_size,
        qk_norm=qk_norm,
        tied_head=llm.flag("tie_word_embeddings", False),
    )
    rope.check_lanes(llm, spec.head_dim)
    return _with_frequencies(spec, rope)


def _with_frequencies(spec: LanguageSpec, rope: Rope) -> LanguageSpec:
    """Return the same decoder with what theta alone does not say of its rotary embedding."""
    frequencies, long = rope.frequencies(spec.rope_theta, spec.head_dim)
    return replace(
        spec,
        rope_frequencies=tuple(frequencies.tolist()),
        rope_long_frequencies=tuple(long.tolist()),
        rope_original=rope.original if rope.kind == "longrope" else None,
        rope_attention=rope.attention,
    )


def finish(llm: Section, spec: LanguageSpec) -> None:
    """Refuse what would change what is computed, and every key that nobody asked for.

    Raises:
        CheckpointError: names the key.
    """
    _refuse_other_attention(llm, spec)
    llm.refuse_other_wiring()
    llm.finish(config_keys.LANGUAGE)


def _refuse_other_attention(llm: Section, spec: LanguageSpec) -> None:
    """What newer decoders do otherwise, where it is told in a way that changes nothing."""
    llm.only("mlp_bias", False)
    llm.only("head_dim", spec.head_dim)
    if spec.rope_original is None:
        llm.only("original_max_position_embeddings", spec.max_position_embeddings)
    llm.only("partial_rotary_factor", 1.0)
    llm.only("rope_pos_id_version", "default")
    llm.only("use_sliding_window", False)
    window = llm.raw("sliding_window", None)
    # Of no effect where it is not used, or is as long as any sequence.
    unbounded = isinstance(window, int) and window >= spec.max_context
    if llm.raw("use_sliding_window", None) is None and not unbounded:
        llm.only("sliding_window", None)
    # More layers are refused as such, and are not listed before.
    llm.only("layer_types", ["full_attention"] * min(spec.num_hidden_layers, MAX_LAYERS))
