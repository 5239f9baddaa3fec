"""config.json to `ModelSpec`: documented defaults, and a refusal by name of what is unknown."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.bundle.errors import CheckpointError, PromptError
from internvl_edge.bundle.prompt import get_template
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import (
    MAX_INTEGER,
    SHUFFLE,
    LanguageSpec,
    ModelSpec,
    PromptSpec,
    RopeType,
    TilingSpec,
    VisionSpec,
    inconsistency,
)
from internvl_edge.export.checkpoint import config_keys

_MISSING = object()

#: Of transformers' own where a config has none.
_ROPE_THETA = 10000.0


class _Section:
    """One object of config.json: typed reads that name the key when they fail."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self._data = data
        self._path = path
        self._asked: set[str] = set()

    def section(self, key: str) -> _Section:
        value = self.raw(key, None)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json has no object '{self.name(key)}'")
        return _Section(value, f"{self._path}{key}.")

    def name(self, key: str) -> str:
        """Return a key with the sections it stands in."""
        return f"{self._path}{key}"

    def raw(self, key: str, default: object = _MISSING) -> Any:
        self._asked.add(key)
        value = self._data.get(key, default)
        if value is _MISSING:
            raise CheckpointError(f"config.json lacks '{self._path}{key}', which has no default")
        return value

    def positive(self, key: str, default: object = _MISSING) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INTEGER:
            raise self.bad(key, value, "a positive integer below 2^31")
        return value

    def integer(self, key: str, default: object = _MISSING) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, value, "an integer")
        return value

    def number(self, key: str, default: object = _MISSING) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(key, value, "a number")
        if not 0 < value <= sys.float_info.max:  # false for NaN
            raise self.bad(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: object = _MISSING) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: object = _MISSING) -> Any:
        value = self.raw(key, default)
        if value not in allowed:
            raise self.bad(key, value, f"one of {', '.join(allowed)}")
        return value

    def only(self, key: str, value: object) -> None:
        """Refuse a key that would change what is computed, unless it is absent, null or `value`."""
        got = self.raw(key, None)
        if got is not None and (got != value or isinstance(got, bool) != isinstance(value, bool)):
            raise self.bad(key, got, quoted(value))

    def finish(self, harmless: Collection[str]) -> None:
        """Refuse what nobody asked for: it may change the mathematics.

        Args:
            harmless: keys that do not; those that begin with an underscore are notes.
        """
        for key in sorted(self._data.keys() - self._asked - set(harmless)):
            if self._data[key] is not None and not key.startswith("_"):
                raise CheckpointError(
                    f"config.json: {quoted(self.name(key))} is {quoted(self._data[key])}; it is not"
                    " known here and may change what the model computes: remove it if it does not"
                )

    def bad(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"config.json: '{self.name(key)}' is {quoted(value)}; supported: {expected}"
        )


@dataclass(frozen=True)
class _Rope:
    """Rotary embedding: `theta` is None where it is not told."""

    kind: RopeType
    factor: float
    theta: float | None


def parse_config(config: Mapping[str, Any]) -> ModelSpec:
    """Read the config.json of an InternVL chat checkpoint.

    Raises:
        CheckpointError: a key is missing or malformed, contradicts another, or names something not
            supported.
    """
    top = _Section(config, "")
    _refuse_quantised(top)
    _refuse_unknown_kind(top)
    spec = ModelSpec(
        vision=_vision(top),
        language=_language(top.section("llm_config")),
        tiling=_tiling(top),
        prompt=_prompt(top),
    )
    top.finish(config_keys.TOP)
    if (problem := inconsistency(spec)) is not None:
        raise CheckpointError(f"config.json: {problem}")
    return spec


def _refuse_quantised(section: _Section) -> None:
    for key in ("quantization_config", "compression_config"):
        if not (found := section.raw(key, None)):
            continue
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        raise CheckpointError(
            f"config.json: the weights are already quantised with {quoted(method or found)}"
            f" ('{section.name(key)}'); export the original checkpoint"
        )


def _refuse_unknown_kind(top: _Section) -> None:
    top.one_of("model_type", ("internvl_chat",))
    architectures = top.raw("architectures", ["InternVLChatModel"])
    if architectures != ["InternVLChatModel"]:
        raise top.bad("architectures", architectures, "['InternVLChatModel']")
    for key in ("use_backbone_lora", "use_llm_lora"):
        if top.integer(key, 0) != 0:
            raise CheckpointError(
                f"config.json: '{key}' is {top.raw(key)}: the adapter is not merged; merge the"
                " LoRA weights into the model, save it, and export that checkpoint"
            )
    if top.flag("pad2square", False):
        raise top.bad("pad2square", True, "false (only V1-1 era checkpoints pad to a square)")


def _vision(top: _Section) -> VisionSpec:
    vision = top.section("vision_config")
    _refuse_quantised(vision)
    vision.one_of("hidden_act", ("gelu",), "gelu")
    if (channels := vision.integer("num_channels", 3)) != 3:
        raise vision.bad("num_channels", channels, "3")
    if (ratio := top.number("downsample_ratio", 0.5)) != 1 / SHUFFLE:
        raise top.bad("downsample_ratio", ratio, str(1 / SHUFFLE))
    image_size = vision.positive("image_size", 224)
    forced = top.raw("force_image_size", None)
    spec = VisionSpec(
        hidden_size=vision.positive("hidden_size", 3200),
        num_attention_heads=vision.positive("num_attention_heads", 25),
        intermediate_size=vision.positive("intermediate_size", 12800),
        num_hidden_layers=vision.positive("num_hidden_layers", 48),
        image_size=image_size,
        tile_size=top.positive("force_image_size") if forced else image_size,
        patch_size=vision.positive("patch_size", 14),
        norm_type=vision.one_of("norm_type", ("rms_norm", "layer_norm"), "rms_norm"),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        qk_normalization=vision.flag("qk_normalization", True),
        qkv_bias=vision.flag("qkv_bias", False),
        select_layer=top.integer("select_layer", -1),
        ps_version=top.one_of("ps_version", ("v1", "v2"), "v1"),
    )
    vision.only("attention_bias", spec.qkv_bias)
    vision.only("use_qk_norm", spec.qk_normalization)
    _refuse_other_wiring(vision)
    vision.finish(config_keys.VISION)
    return spec


def _language(llm: _Section) -> LanguageSpec:
    _refuse_quantised(llm)
    architectures = llm.raw("architectures")
    if architectures != ["InternLM2ForCausalLM"]:
        raise llm.bad("architectures", architectures, "['InternLM2ForCausalLM']")
    llm.one_of("hidden_act", ("silu",), "silu")
    if llm.flag("tie_word_embeddings", False):
        raise llm.bad("tie_word_embeddings", True, "false")
    heads = llm.positive("num_attention_heads", 32)
    kv_heads = heads if llm.raw("num_key_value_heads", None) is None else None
    rope = _rope(llm)
    spec = LanguageSpec(
        hidden_size=llm.positive("hidden_size", 4096),
        intermediate_size=llm.positive("intermediate_size", 11008),
        num_hidden_layers=llm.positive("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or llm.positive("num_key_value_heads"),
        vocab_size=llm.positive("vocab_size", 103168),
        rms_norm_eps=llm.number("rms_norm_eps", 1e-6),
        bias=llm.flag("bias", True),
        max_position_embeddings=llm.positive("max_position_embeddings", 2048),
        rope_theta=_ROPE_THETA if rope.theta is None else rope.theta,
        rope_type=rope.kind,
        rope_factor=rope.factor,
    )
    _refuse_other_attention(llm, spec)
    _refuse_other_wiring(llm)
    llm.finish(config_keys.LANGUAGE)
    return spec


def _refuse_other_wiring(section: _Section) -> None:
    """What a config may ask of any of transformers' models."""
    section.only("add_cross_attention", False)
    section.only("cross_attention_hidden_size", None)
    section.only("is_encoder_decoder", False)
    section.only("pruned_heads", {})
    section.only("tie_encoder_decoder", False)
    section.only("use_moe", False)


def _refuse_other_attention(llm: _Section, spec: LanguageSpec) -> None:
    """What newer decoders do otherwise, where it is told in a way that changes nothing."""
    llm.only("attention_bias", spec.bias)
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


def _rope(llm: _Section) -> _Rope:
    """As `rope_scaling` (transformers 4) and as `rope_parameters` (5) tell it."""
    told = {
        key: _rope_section(llm.section(key), llm, default)
        for key, default in (("rope_scaling", _MISSING), ("rope_parameters", "default"))
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


def _rope_section(rope: _Section, llm: _Section, default: object) -> _Rope:
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


def _tiling(top: _Section) -> TilingSpec:
    return TilingSpec(
        dynamic=top.flag("dynamic_image_size", False),
        min_tiles=top.positive("min_dynamic_patch", 1),
        max_tiles=top.positive("max_dynamic_patch", 6),
        thumbnail=top.flag("use_thumbnail", False),
    )


def _prompt(top: _Section) -> PromptSpec:
    name = top.raw("template")
    try:
        get_template(str(name))
    except PromptError as error:
        raise CheckpointError(f"config.json: {error}") from error
    # null occurs in fine-tunes; the reference would print the word "None". Absent is meant.
    message = top.raw("system_message", None)
    if message is not None and not isinstance(message, str):
        raise top.bad("system_message", message, "text")
    return PromptSpec(template=str(name), system_message=message)
