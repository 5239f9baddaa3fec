"""config.json to `ModelSpec`: documented defaults, and a refusal by name of what is unknown."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from internvl_edge.runtime.errors import CheckpointError, PromptError
from internvl_edge.runtime.prompt import get_template
from internvl_edge.runtime.specs import (
    MAX_INTEGER,
    SHUFFLE,
    LanguageSpec,
    ModelSpec,
    PromptSpec,
    TilingSpec,
    VisionSpec,
)

_MISSING = object()

#: More layers than any known decoder has; keeps a damaged config from filling the memory.
_MAX_LAYERS = 1024


class _Section:
    """One object of config.json: typed reads that name the key when they fail."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self._data = data
        self._path = path

    def section(self, key: str) -> _Section:
        value = self._data.get(key)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json has no object '{self._path}{key}'")
        return _Section(value, f"{self._path}{key}.")

    def raw(self, key: str, default: object = _MISSING) -> Any:
        value = self._data.get(key, default)
        if value is _MISSING:
            raise CheckpointError(f"config.json lacks '{self._path}{key}', which has no default")
        return value

    def positive(self, key: str, default: object = _MISSING) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INTEGER:
            raise self.bad(key, value, "a positive integer below 2^31")
        return value

    def layers(self, default: int) -> int:
        value = self.positive("num_hidden_layers", default)
        if value > _MAX_LAYERS:
            raise self.bad("num_hidden_layers", value, f"at most {_MAX_LAYERS}")
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

    def bad(self, key: str, value: object, expected: str) -> CheckpointError:
        got = repr(value)
        got = got if len(got) <= 100 else f"{got[:100]}..."
        return CheckpointError(f"config.json: '{self._path}{key}' is {got}; supported: {expected}")


def parse_config(config: Mapping[str, Any]) -> ModelSpec:
    """Read the config.json of an InternVL chat checkpoint.

    Raises:
        CheckpointError: a key is missing or malformed, or names something not supported.
    """
    top = _Section(config, "")
    _refuse_unknown_kind(top)
    return ModelSpec(
        vision=_vision(top),
        language=_language(top.section("llm_config")),
        tiling=_tiling(top),
        prompt=_prompt(top),
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
        num_hidden_layers=vision.layers(48),
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
    _check_vision(spec)
    return spec


def _check_vision(spec: VisionSpec) -> None:
    _check_divisible("vision_config.hidden_size", spec.hidden_size, spec.num_attention_heads)
    _check_divisible("tile size", spec.tile_size, spec.patch_size * SHUFFLE)
    if spec.image_size < spec.patch_size:
        raise CheckpointError(
            f"config.json: image_size {spec.image_size} < patch_size {spec.patch_size}"
        )
    if not 0 <= spec.layers_run <= spec.num_hidden_layers:
        raise CheckpointError(
            f"config.json: 'select_layer' is {spec.select_layer}, the tower has"
            f" {spec.num_hidden_layers} layers"
        )


def _language(llm: _Section) -> LanguageSpec:
    architectures = llm.raw("architectures")
    if architectures != ["InternLM2ForCausalLM"]:
        raise llm.bad("architectures", architectures, "['InternLM2ForCausalLM']")
    llm.one_of("hidden_act", ("silu",), "silu")
    if llm.flag("tie_word_embeddings", False):
        raise llm.bad("tie_word_embeddings", True, "false")
    heads = llm.positive("num_attention_heads", 32)
    kv_heads = heads if llm.raw("num_key_value_heads", None) is None else None
    rope_type, factor = _rope_scaling(llm)
    spec = LanguageSpec(
        hidden_size=llm.positive("hidden_size", 4096),
        intermediate_size=llm.positive("intermediate_size", 11008),
        num_hidden_layers=llm.layers(32),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or llm.positive("num_key_value_heads"),
        vocab_size=llm.positive("vocab_size", 103168),
        rms_norm_eps=llm.number("rms_norm_eps", 1e-6),
        bias=llm.flag("bias", True),
        max_position_embeddings=llm.positive("max_position_embeddings", 2048),
        rope_theta=llm.number("rope_theta", 10000),
        rope_type=rope_type,
        rope_factor=factor,
    )
    _check_divisible("llm_config.hidden_size", spec.hidden_size, heads)
    _check_divisible("llm_config.num_attention_heads", heads, spec.num_key_value_heads)
    _check_divisible("llm_config head size", spec.head_dim, 2)
    if (longest := spec.max_position_embeddings * factor) > MAX_INTEGER:
        raise CheckpointError(
            "config.json: 'max_position_embeddings' times the factor of 'rope_scaling' is"
            f" {longest:.6g}; the longest context supported is {MAX_INTEGER}"
        )
    return spec


def _rope_scaling(llm: _Section) -> tuple[Any, float]:
    if llm.raw("rope_scaling", None) is None:
        return "default", 1.0
    scaling = llm.section("rope_scaling")
    kind = scaling.one_of("type", ("dynamic", "linear"))
    factor = scaling.number("factor")
    if factor < 1:
        raise scaling.bad("factor", factor, "1 or more")
    return kind, factor


def _tiling(top: _Section) -> TilingSpec:
    spec = TilingSpec(
        dynamic=top.flag("dynamic_image_size", False),
        min_tiles=top.positive("min_dynamic_patch", 1),
        max_tiles=top.positive("max_dynamic_patch", 6),
        thumbnail=top.flag("use_thumbnail", False),
    )
    if spec.min_tiles > spec.max_tiles:
        raise top.bad("min_dynamic_patch", spec.min_tiles, f"at most {spec.max_tiles}")
    return spec


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


def _check_divisible(name: str, value: int, divisor: int) -> None:
    if value % divisor:
        raise CheckpointError(f"config.json: {name} {value} is not a multiple of {divisor}")
