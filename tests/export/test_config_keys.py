"""Keys of config.json: what changes the mathematics is read or refused by name, never skipped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import small_config, write_checkpoint

from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.bundle.quoting import LONGEST, quoted
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.runtime import CheckpointError

#: What transformers 4.37 writes of any model beside what it computes with.
GENERIC: dict[str, Any] = {
    "_name_or_path": "internlm/internlm2-chat-20b",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": 1,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": 2,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": 2,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers_version": "4.37.2",
    "typical_p": 1.0,
    "use_bfloat16": True,
}

#: What released members have in each section beside that.
RELEASED: dict[str, dict[str, Any]] = {
    "": {
        "_commit_hash": None,
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "hidden_size": 6144,
        "image_fold": None,
        "pad2square": False,
        "system_message": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
    },
    "llm_config": GENERIC
    | {
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"},
        "hidden_act": "silu",
        "model_type": "internlm2",
        "pretraining_tp": 1,
        "rope_pos_id_version": "default",
        "rope_pos_id_stride": None,
        "use_cache": True,
    },
    "vision_config": GENERIC
    | {
        "_attn_implementation_autoset": True,
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "capacity_factor": 1.2,
        "drop_path_rate": 0.4,
        "dropout": 0.0,
        "eval_capacity_factor": 1.4,
        "hidden_act": "gelu",
        "initializer_factor": 0.1,
        "laux_allreduce": "all_nodes",
        "model_type": "intern_vit_6b",
        "moe_coeff_ratio": 0.5,
        "moe_config": None,
        "moe_intermediate_size": 768,
        "moe_output_scale": 4.0,
        "noisy_gate_policy": "RSample_before",
        "num_channels": 3,
        "num_experts": 8,
        "num_routed_experts": 4,
        "num_shared_experts": 4,
        "shared_expert_intermediate_size": 3072,
        "use_flash_attn": True,
        "use_moe": False,
        "use_residual": True,
        "use_rts": False,
        "use_weighted_residual": False,
    },
}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value set, by its path with dots."""
    config = copy.deepcopy(config)
    *steps, last = path.split(".")
    place = config
    for step in steps:
        place = place[step]
    place[last] = value
    return config


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_config(config)
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CONFIGS)
def test_what_released_members_have_beside_changes_nothing(name: str) -> None:
    plain: dict[str, Any] = copy.deepcopy(dict(CONFIGS[name]))
    full = copy.deepcopy(plain) | RELEASED[""]
    for section in ("llm_config", "vision_config"):
        full[section] = RELEASED[section] | plain[section]
    assert parse_config(full) == parse_config(plain)


@pytest.mark.parametrize(
    "section", ["", "llm_config.", "vision_config.", "llm_config.rope_scaling."]
)
@pytest.mark.parametrize("value", [1, False, 0, "", [], {}, "x" * 10_000], ids=repr)
def test_an_unknown_key_is_refused_by_name(section: str, value: object) -> None:
    message = refusal(changed(small_config(), f"{section}attn_logit_softcapping", value))
    assert f"'{section}attn_logit_softcapping' is " in message
    assert "remove it if it does not" in message
    assert len(message) < 2 * LONGEST


@pytest.mark.parametrize("section", ["", "llm_config.", "vision_config."])
@pytest.mark.parametrize(("key", "value"), [("softcapping", None), ("_note", {"x": 1})])
def test_null_is_absent_and_notes_are_notes(section: str, key: str, value: object) -> None:
    config = changed(small_config(), section + key, value)
    assert parse_config(config) == parse_config(small_config())


def test_a_window_as_long_as_the_context_changes_nothing() -> None:
    """Phi-3 says 262,144 and has no switch; the small model reads 512 tokens stretched by 2."""
    config = changed(small_config(), "llm_config.sliding_window", 1024)
    assert parse_config(config) == parse_config(small_config())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("llm_config.sliding_window", 1023),
        ("llm_config.use_sliding_window", True),
        ("llm_config.attention_bias", True),
        ("llm_config.mlp_bias", True),
        ("llm_config.head_dim", 32),
        ("llm_config.partial_rotary_factor", 0.5),
        ("llm_config.original_max_position_embeddings", 256),
        ("llm_config.layer_types", ["full_attention", "sliding_attention"]),
        ("llm_config.rope_pos_id_version", "v2pe_fix"),
        ("llm_config.rope_pos_id_stride", 64),
        ("llm_config.rope_type", "dynamic"),
        ("llm_config.pruned_heads", {"0": [1]}),
        ("llm_config.use_moe", True),
        ("llm_config.moe_config", {"num_experts": 8}),
        ("llm_config.add_cross_attention", True),
        ("llm_config.is_encoder_decoder", True),
        ("llm_config.rope_scaling.partial_rotary_factor", 0.25),
        ("llm_config.rope_scaling.original_max_position_embeddings", 256),
        ("llm_config.rope_scaling.attention_factor", 1.2),
        ("vision_config.pruned_heads", {"0": [1]}),
        ("vision_config.use_moe", True),
        ("vision_config.attention_bias", True),
        ("vision_config.use_qk_norm", False),
        ("vision_config.use_mean_pooling", True),
        ("image_fold", 2),
        ("projector_hidden_act", "relu"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_change_the_mathematics(path: str, value: Any) -> None:
    assert f"'{path}' is {value!r}" in refusal(changed(small_config(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("llm_config.sliding_window", None),
        ("llm_config.use_sliding_window", False),
        ("llm_config.attention_bias", False),
        ("llm_config.mlp_bias", False),
        ("llm_config.head_dim", 16),
        ("llm_config.partial_rotary_factor", 1.0),
        ("llm_config.original_max_position_embeddings", 512),
        ("llm_config.layer_types", ["full_attention", "full_attention"]),
        ("llm_config.max_window_layers", 28),
        ("llm_config.rope_scaling.partial_rotary_factor", 1.0),
        ("llm_config.rope_scaling.original_max_position_embeddings", 512),
        ("vision_config.attention_bias", False),
        ("vision_config.use_qk_norm", True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_says_that_nothing_is_changed(path: str, value: Any) -> None:
    assert parse_config(changed(small_config(), path, value)) == parse_config(small_config())


def test_a_window_that_is_not_used() -> None:
    config = changed(small_config(), "llm_config.sliding_window", 32768)
    config["llm_config"]["use_sliding_window"] = False
    assert parse_config(config) == parse_config(small_config())


# Weights that are quantised already.


@pytest.mark.parametrize("section", ["", "llm_config.", "vision_config."])
@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8", "x" * 10_000], ids=quoted)
def test_quantised_weights(section: str, method: str) -> None:
    config = changed(small_config(), f"{section}quantization_config", {"quant_method": method})
    message = refusal(config)
    assert f"already quantised with '{method[:100]}" in message
    assert f"'{section}quantization_config'" in message
    assert "export the original checkpoint" in message
    assert len(message) < 2 * LONGEST


def test_quantised_weights_are_said_before_what_is_missing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())
    (checkpoint / "model.safetensors").unlink()
    config = small_config(quantization_config={"load_in_4bit": True})
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"already quantised with \{'load_in_4bit': True\}"):
        export_bundle(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize("value", [None, {}])
def test_no_quantisation(value: object) -> None:
    config = small_config(quantization_config=value)
    assert parse_config(config) == parse_config(small_config())


# Sizes that would be asked of memory.


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("force_image_size", 56_000, "56000, at most 2048"),
        ("vision_config.image_size", 56_000, "56000, at most 2048"),
        ("max_dynamic_patch", 10**9, "1000000000, at most 1024"),
        ("force_image_size", 1792, "4096 positions of the decoder, the context has 1024"),
    ],
)
def test_sizes_beyond_what_is_supported(path: str, value: int, said: str) -> None:
    assert said in refusal(changed(small_config(), path, value))
