"""config.json: the documented defaults, every refusal by name, and nothing but CheckpointError."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
from checkpoints import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.runtime import CheckpointError

#: Only what has no default.
MINIMAL: dict[str, Any] = {
    "model_type": "internvl_chat",
    "template": "internlm2-chat",
    "vision_config": {},
    "llm_config": {"architectures": ["InternLM2ForCausalLM"]},
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 3200,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "num_hidden_layers": 48,
        "image_size": 224,
        "tile_size": 224,
        "patch_size": 14,
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "qk_normalization": True,
        "qkv_bias": False,
        "select_layer": -1,
        "ps_version": "v1",
    },
    "language": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 103168,
        "rms_norm_eps": 1e-6,
        "bias": True,
        "max_position_embeddings": 2048,
        "rope_theta": 10000,
        "rope_type": "default",
        "rope_factor": 1.0,
    },
    "tiling": {"dynamic": False, "min_tiles": 1, "max_tiles": 6, "thumbnail": False},
    "prompt": {"template": "internlm2-chat", "system_message": None},
}

REFUSALS: list[tuple[str, Any, str]] = [
    ("model_type", "interns1", "internvl_chat"),
    ("model_type", "llava", "internvl_chat"),
    ("architectures", ["LlavaForConditionalGeneration"], "InternVLChatModel"),
    ("template", "vicuna_v1.1", "unknown prompt template 'vicuna_v1.1'"),
    ("system_message", 7, "text"),
    ("use_backbone_lora", 16, "merge"),
    ("use_llm_lora", 128, "merge"),
    ("use_llm_lora", "no", "an integer"),
    ("pad2square", True, "false"),
    ("downsample_ratio", 0.25, "0.5"),
    ("downsample_ratio", 0, "a positive number"),
    ("ps_version", "v3", "v1, v2"),
    ("select_layer", 3, "2 layers"),
    ("select_layer", -4, "2 layers"),
    ("select_layer", "last", "an integer"),
    ("force_image_size", 60, "multiple of 28"),
    ("force_image_size", -448, "a positive integer"),
    ("force_image_size", 448.0, "a positive integer"),
    ("dynamic_image_size", 1, "true or false"),
    ("use_thumbnail", "yes", "true or false"),
    ("min_dynamic_patch", 0, "a positive integer"),
    ("min_dynamic_patch", 7, "at most 6"),
    ("max_dynamic_patch", None, "a positive integer"),
    ("vision_config", [], "no object 'vision_config'"),
    ("vision_config.num_channels", 1, "3"),
    ("vision_config.hidden_act", "quick_gelu", "gelu"),
    ("vision_config.hidden_size", 33, "multiple of 2"),
    ("vision_config.num_hidden_layers", True, "a positive integer"),
    ("vision_config.num_hidden_layers", 10**9, "at most"),
    ("vision_config.patch_size", 0, "a positive integer"),
    ("vision_config.image_size", 13, "image_size 13 < patch_size 14"),
    ("vision_config.norm_type", "batch_norm", "rms_norm, layer_norm"),
    ("vision_config.layer_norm_eps", math.nan, "a positive number"),
    ("vision_config.qk_normalization", "true", "true or false"),
    ("llm_config", None, "no object 'llm_config'"),
    ("llm_config.architectures", ["InternLM2VEForCausalLM"], "InternLM2ForCausalLM"),
    ("llm_config.architectures", "InternLM2ForCausalLM", "InternLM2ForCausalLM"),
    ("llm_config.hidden_act", "gelu", "silu"),
    ("llm_config.tie_word_embeddings", "true", "true or false"),
    ("llm_config.hidden_size", 66, "multiple of 4"),
    ("llm_config.num_key_value_heads", 3, "multiple of 3"),
    ("llm_config.num_hidden_layers", 10**9, "at most"),
    ("llm_config.vocab_size", "92553", "a positive integer"),
    ("llm_config.vocab_size", 2**40, "a positive integer"),
    ("llm_config.rms_norm_eps", -1e-5, "a positive number"),
    ("llm_config.rope_theta", math.inf, "a positive number"),
    ("llm_config.rope_theta", 10**400, "a positive number"),
    ("llm_config.rope_scaling", "dynamic", "no object 'llm_config.rope_scaling'"),
    ("llm_config.rope_scaling.type", "mrope", "default, linear, dynamic, llama3, yarn, longrope"),
    ("llm_config.rope_scaling.factor", 0.5, "1 or more"),
    ("llm_config.rope_scaling.factor", "2.0", "a number"),
    ("llm_config.rope_scaling.factor", 1e300, "longest context"),
]

KEYS = [
    *(key for key in small_config() if key not in ("vision_config", "llm_config")),
    *("vision_config", "llm_config", "system_message", "pad2square", "use_llm_lora"),
    *(f"vision_config.{key}" for key in (*small_config()["vision_config"], "layer_norm_eps")),
    *(f"llm_config.{key}" for key in (*small_config()["llm_config"], "tie_word_embeddings")),
    *("llm_config.rope_scaling.type", "llm_config.rope_scaling.factor"),
]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**63, 10**400, -(10**400), 1e308, 5e-324])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["v1", "v2", "linear", "layer_norm", "internvl2_5"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part, fields in DEFAULTS.items() for field in fields]
)
def test_default_of_an_absent_key(part: str, field: str) -> None:
    assert getattr(getattr(parse_config(MINIMAL), part), field) == DEFAULTS[part][field]


def test_every_field_has_its_default_checked() -> None:
    assert {part: set(fields) for part, fields in DEFAULTS.items()} == {
        part: set(fields) for part, fields in parse_config(MINIMAL).to_dict().items()
    }


@pytest.mark.parametrize(
    "key",
    [
        *("model_type", "template", "vision_config", "llm_config", "llm_config.architectures"),
        *("llm_config.rope_scaling.type", "llm_config.rope_scaling.factor"),
    ],
)
def test_key_without_default(key: str) -> None:
    config = small_config()
    section, name = _locate(config, key)
    del section[name]
    with pytest.raises(CheckpointError, match=f"config.json .*'{key}'"):
        parse_config(config)


@pytest.mark.parametrize("key", ["force_image_size", "system_message", "llm_config.rope_scaling"])
def test_null_means_absent(key: str) -> None:
    absent, null = small_config(), _changed(small_config(), key, None)
    section, name = _locate(absent, key)
    section.pop(name, None)
    assert parse_config(null) == parse_config(absent)


def test_null_key_value_heads_mean_one_per_head() -> None:
    config = _changed(small_config(), "llm_config.num_key_value_heads", None)
    assert parse_config(config).language.num_key_value_heads == 4


@pytest.mark.parametrize("forced", [None, 0])
def test_tile_size_falls_back_to_image_size(forced: int | None) -> None:
    config = _changed(small_config(tile=112), "force_image_size", forced)
    assert parse_config(config).vision.tile_size == 112


def test_unknown_keys_are_ignored() -> None:
    config = small_config(_commit_hash=None, torch_dtype="bfloat16", hidden_size=1, auto_map={})
    assert parse_config(config) == parse_config(small_config())


@pytest.mark.parametrize(("key", "value", "expected"), REFUSALS, ids=lambda item: str(item)[:40])
def test_refusal(key: str, value: Any, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(_changed(small_config(), key, value))
    message = str(caught.value)
    assert "config.json" in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["llm_config.rope_theta", "vision_config.hidden_size"])
def test_refusal_of_a_huge_number_stays_readable(key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(_changed(small_config(), key, 10**3000))
    assert len(str(caught.value)) < 300


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_parses_or_is_refused(key: str, value: Any) -> None:
    _parse_or_refuse(_changed(small_config(), key, value))


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6), start=st.booleans())
def test_any_values_together_parse_or_are_refused(changes: dict[str, Any], start: bool) -> None:
    config = small_config() if start else copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        try:
            _changed(config, key, value)
        except (KeyError, TypeError):  # an earlier change took the section away
            continue
    _parse_or_refuse(config)


@settings(max_examples=100, deadline=None)
@given(config=st.dictionaries(st.text(max_size=8) | st.sampled_from(list(MINIMAL)), JSON))
def test_any_object_parses_or_is_refused(config: dict[str, Any]) -> None:
    _parse_or_refuse(config)


def _parse_or_refuse(config: dict[str, Any]) -> None:
    """What parses must also have finite derived values: nothing may fail later."""
    try:
        spec = parse_config(config)
    except CheckpointError:
        return
    _use(spec)


def _use(spec: ModelSpec) -> None:
    assert spec.vision.tokens_per_tile >= 1
    assert 1 <= spec.language.max_context < 2**31
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert all(min(shape) >= 1 for shape in tensor_shapes(spec).values())
    for part in dataclasses.fields(spec):
        assert getattr(spec, part.name) is not None


def _locate(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *path, name = key.split(".")
    for step in path:
        config = config[step]
    return config, name


def _changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, name = _locate(config, key)
    section[name] = value
    return config
