"""What the configs of all decoder families share: sizes, rotary embedding, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.specs import LanguageSpec, RopeType
from internvl_edge.export.checkpoint import config_keys
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


@dataclass(frozen=True)
class _Rope:
    """Rotary embedding: `theta` is None where it is not told."""

    kind: RopeType
    factor: float
    theta: float | None


def read_decoder(
    llm: Section,
    defaults: Defaults,
    *,
    bias: bool = False,
    qkv_bias: bool = False,
    head_size: int | None = None,
    qk_norm: bool = False,
) -> LanguageSpec:
    """Read what all decoders have; `finish` follows, when a family has read its own keys.

    Args:
        bias: whether all of attention's projections have one.
        qkv_bias: whether query, key and value have one and the output has none.
        head_size: where it does not follow from the other sizes.
        qk_norm: whether the heads of queries and keys are normed before they are rotated.

    Raises:
        CheckpointError: a key is missing or malformed.
    """
    llm.one_of("hidden_act", ("silu",), "silu")

    def size(key: str) -> int:
        return llm.positive(key, defaults.sizes.get(key, REQUIRED))

    heads = size("num_attention_heads")
    kv_heads = heads if llm.raw("num_key_value_heads", None) is None else None
    rope = _rope(llm)
    theta = defaults.rope_theta if rope.theta is None else rope.theta
    return LanguageSpec(
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
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
    llm.only("original_max_position_embeddings", spec.max_position_embeddings)
    llm.only("partial_rotary_factor", 1.0)
    llm.only("rope_pos_id_version", "default")
    llm.only("use_sliding_window", False)
    if llm.raw("use_sliding_window", None) is None:
        llm.only("sliding_window", None)
    llm.raw("sliding_window", None)  # of no effect where it is not used
    llm.only("layer_types", ["full_attention"] * spec.num_hidden_layers)


def _rope(llm: Section) -> _Rope:
    """As `rope_scaling` (transformers 4) and as `rope_parameters` (5) tell it."""
    told = {
        key: _rope_section(llm.section(key), llm, default)
        for key, default in (("rope_scaling", REQUIRED), ("rope_parameters", "default"))
        if llm.raw(key, None) is not None
    }
    first, *others = told.values() or (_Rope("default", 1.0, None),)
    for other in others:
        if (other.kind, other.factor) != (first.kind, first.factor):
            raise CheckpointError(
                f"config.json: 'llm_config.rope_scaling' is {first.kind} by {first.factor:.6g},"
                f" 'llm_config.rope_parameters' is {other.kind} by {other.factor:.6g}; remove the"
                " one that is not meant"
            )
    beside = None if llm.raw("rope_theta", None) is None else llm.number("rope_theta")
    thetas = {llm.name("rope_theta"): beside}
    thetas |= {llm.name(f"{key}.rope_theta"): rope.theta for key, rope in told.items()}
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        both = ", ".join(f"'{name}' is {theta:.12g}" for name, theta in given.items())
        raise CheckpointError(f"config.json: {both}; remove the one that is not meant")
    return _Rope(first.kind, first.factor, next(iter(given.values()), None))


def _rope_section(rope: Section, llm: Section, default: object) -> _Rope:
    """One object that describes the rotary embedding, under any of its keys' spellings."""
    kinds = ("dynamic", "linear", "default")
    spelt = [key for key in ("rope_type", "type") if rope.raw(key, None) is not None]
    told = [rope.one_of(key, kinds) for key in spelt] or [rope.one_of("type", kinds, default)]
    if len(set(told)) > 1:
        raise rope.bad("type", told[-1], f"the same as 'rope_type', {told[0]}")
    kind: RopeType = told[0]
    if kind == "default":
        rope.only("factor", 1.0)
    factor = 1.0 if kind == "default" else rope.number("factor")
    if factor < 1:
        raise rope.bad("factor", factor, "1 or more")
    theta = None if rope.raw("rope_theta", None) is None else rope.number("rope_theta")
    rope.only("partial_rotary_factor", 1.0)
    rope.only("original_max_position_embeddings", llm.raw("max_position_embeddings", None))
    rope.finish(())
    return _Rope(kind, factor, theta)
