"""Decoders of every family: their configs, and what transformers' own classes compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from checkpoints import random_state, small_config
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

PREFIX = "language_model."

#: Of every family the decoder's config, but for sizes that it shares with the others.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama, biases": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2, tied": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "qwen3, biases, heads of 24": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": True,
    },
    "llama, heads of 8": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 8,
    },
    "internlm3": {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "head_dim": 24,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "pad_token_id": 0,
        "sliding_window": 256,
    },
}
#: With experts; INT8 and INT4 have an operator for ONNX Runtime only.
EXPERTS: dict[str, dict[str, Any]] = {
    name: {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "norm_topk_prob": normed,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
    }
    for name, experts, chosen, normed in (
        ("qwen3 moe", 8, 2, True),
        ("qwen3 moe, shares as they are", 8, 3, False),
        ("qwen3 moe, all chosen", 4, 4, True),
    )
}
#: Kinds of rotary embedding, with sequences that go beyond where each begins to scale.
ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {
        "max_position_embeddings": 24,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1 + i / 8 for i in range(8)],
            "long_factor": [2 + i for i in range(8)],
            "original_max_position_embeddings": 16,
        }
    },
}
#: One key head for each query head, for several, for all.
HEADS = [(4, 4), (4, 2), (7, 1)]


def decoder_config(decoder: dict[str, Any], heads: tuple[int, int]) -> dict[str, Any]:
    """A whole model's config.json with this decoder."""
    config = small_config(layers=2, vision_layers=1)
    config["llm_config"] = {
        "hidden_size": 16 * heads[0],
        "intermediate_size": 192,
        "max_position_embeddings": 256,
        "num_attention_heads": heads[0],
        "num_hidden_layers": 2,
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 512,
        **decoder,
    }
    return config


def reference_logits(config: dict[str, Any], ids: list[int]) -> NDArray[np.float32]:
    """Logits of every position by transformers' own class `(tokens, vocab)`."""
    state = {
        name[len(PREFIX) :]: torch.from_numpy(values)
        for name, values in random_state(config).items()
        if name.startswith(PREFIX)
    }
    decoder = dict(config["llm_config"])
    told = AutoConfig.for_model(decoder.pop("model_type"), **decoder)
    model = AutoModelForCausalLM.from_config(told, attn_implementation="eager").float().eval()
    missing, unknown = model.load_state_dict(_stacked(state, config), strict=False)
    assert set(missing) <= ({"lm_head.weight"} if told.tie_word_embeddings else set())
    assert not unknown
    model.tie_weights()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def _stacked(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Experts in one tensor, as transformers holds them in memory."""
    decoder = config["llm_config"]
    layers, count = decoder["num_hidden_layers"], decoder.get("num_experts", 0)
    stacked = {name: value for name, value in state.items() if ".experts." not in name}
    for layer in range(layers if count else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}0.down_proj.weight" not in state:
            continue
        parts = {
            kind: torch.stack([state[f"{prefix}{e}.{kind}_proj.weight"] for e in range(count)])
            for kind in ("gate", "up", "down")
        }
        stacked[f"{prefix}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        stacked[f"{prefix}down_proj"] = parts["down"]
    return stacked
