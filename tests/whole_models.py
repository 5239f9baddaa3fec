"""Whole models of random shape by transformers' own classes, and their files in either layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

#: Its tokenizer and template are every model's here.
FILES = Path(__file__).with_name("families") / "hf_qwen2" / "model"
VOCAB = 397
#: Where what stretches a rotary embedding begins: prompts and answers go beyond it.
TRAINED, LONGEST = 64, 256

#: The class of every family, by its `model_type`.
KINDS = {
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": LONGEST / TRAINED},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
)
SHAPES = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 5),
        "head_dim": st.sampled_from([8, 16, 24, 32]),
        "mlp": st.integers(1, 12).map(lambda n: 8 * n),
        "layers": st.integers(1, 3),
        "tied": st.booleans(),
        "bias": st.booleans(),
        "rope": st.sampled_from(_ROPES),
        "vision_heads": st.integers(1, 3),
        "vision_norm": st.sampled_from(["layer_norm", "rms_norm"]),
        "vision_qk_norm": st.booleans(),
        "vision_bias": st.booleans(),
        "tile": st.sampled_from([28, 56]),
        # Of every turn the tiles of each image.
        "turns": st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=2),
    }
)


def model_config(kind: str, shape: dict[str, Any]) -> InternVLConfig:
    """A config of transformers' own layout."""
    text = AutoConfig.for_model(kind, **_decoder(kind, shape))
    vision = {
        "hidden_size": 16 * shape["vision_heads"],
        "num_attention_heads": shape["vision_heads"],
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "image_size": [shape["tile"], shape["tile"]],
        "norm_type": shape["vision_norm"],
        "use_qk_norm": shape["vision_qk_norm"],
        "attention_bias": shape["vision_bias"],
    }
    return InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=390,
        image_seq_length=(shape["tile"] // 14 // 2) ** 2,
        tie_word_embeddings=shape["tied"],
    )


def _decoder(kind: str, shape: dict[str, Any]) -> dict[str, Any]:
    heads, rope = shape["kv_heads"] * shape["group"], dict(shape["rope"])
    stretched = rope["rope_type"] == "dynamic" and kind != "phi3"
    free = kind in ("qwen3", "qwen3_moe")  # the width need not be that of all heads
    told: dict[str, Any] = {
        "hidden_size": 48 if free else heads * shape["head_dim"],
        "intermediate_size": shape["mlp"],
        "max_position_embeddings": TRAINED if stretched else LONGEST,
        "num_attention_heads": heads,
        "num_hidden_layers": shape["layers"],
        "num_key_value_heads": shape["kv_heads"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape["tied"],
        "vocab_size": VOCAB,
    }
    if kind == "phi3":
        lanes = shape["head_dim"] // 2
        told |= {"pad_token_id": 0, "original_max_position_embeddings": LONGEST}
        if rope["rope_type"] != "default":
            short, long = ([x + i / 8 for i in range(lanes)] for x in (1.0, 2.0))
            rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
            told["original_max_position_embeddings"] = TRAINED
    else:
        told["head_dim"] = shape["head_dim"]
    if kind not in ("qwen2", "phi3", "internlm3"):
        told["attention_bias"] = shape["bias"]
    if kind == "qwen3_moe":
        told |= {"moe_intermediate_size": shape["mlp"], "num_experts": 5, "num_experts_per_tok": 2}
        told["norm_topk_prob"] = shape["bias"]
    return told | {"rope_parameters": rope | {"rope_theta": 10000.0}}


def drawn_model(config: InternVLConfig, seed: int) -> InternVLForConditionalGeneration:
    """Weights that keep activations and logits near one, whatever the class's initialisation."""
    tied = config.text_config.tie_word_embeddings
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if "experts" in name or (tied and "embed_tokens" in name):
                value.copy_(drawn * value.shape[-1] ** -0.5)
            elif value.ndim > 1 and "embed" not in name and "token" not in name:
                value.copy_(drawn * value[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.2 * drawn)
            else:
                value.copy_(drawn if value.ndim > 1 else 0.3 * drawn)
    return model


def save_native(model: InternVLForConditionalGeneration, folder: Path, tile: int) -> Path:
    """As transformers writes it, with a tokenizer's and a processor's files."""
    disable_progress_bar()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(FILES / name, folder / name)
    processor = json.loads((FILES / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": tile, "width": tile}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 368}))
    return folder


#: Names of transformers' layout, of either generation, and of the original.
_NAMES = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^(model\.)?multi_modal_projector\.layer_norm\.": "mlp1.0.",
    r"^(model\.)?multi_modal_projector\.linear_1\.": "mlp1.1.",
    r"^(model\.)?multi_modal_projector\.linear_2\.": "mlp1.3.",
    r"^(model\.)?vision_tower\.": "vision_model.",
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"embeddings\.patch_embeddings\.projection\.": "embeddings.patch_embedding.",
    r"encoder\.layer\.": "encoder.layers.",
    r"layernorm_before\.": "norm1.",
    r"layernorm_after\.": "norm2.",
    r"lambda_(\d)": r"ls\1",
    r"attention\.projection_layer\.": "attn.proj.",
    r"attention\.([qk]_norm)\.": r"attn.\1.",
}


def rewrite_original(native: Path, folder: Path, kind: str) -> Path:
    """The same checkpoint in the original layout: names, fused rows, config."""
    shutil.copytree(native, folder)
    state: dict[str, torch.Tensor] = {}
    for name, value in load_file(native / "model.safetensors").items():
        for pattern, other in _NAMES.items():
            name = re.sub(pattern, other, name)
        state[name] = value
    for first in [name for name in state if "vision_model" in name and ".q_proj." in name]:
        parts = [state.pop(first.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[first.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    save_file(state, folder / "model.safetensors")
    config = json.loads((native / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    side = vision["image_size"][0]
    told = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": side,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "llm_config": text | {"architectures": [KINDS[kind]]},
        "vision_config": {
            **{key: vision[key] for key in ("hidden_size", "num_attention_heads", "norm_type")},
            **{key: vision[key] for key in ("intermediate_size", "num_hidden_layers")},
            "image_size": side,
            "patch_size": 14,
            "qkv_bias": vision["attention_bias"],
            "qk_normalization": vision["use_qk_norm"],
        },
    }
    (folder / "config.json").write_text(json.dumps(told))
    return folder
