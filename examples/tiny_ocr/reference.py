"""Bridge between InternVL-Chat-V1-5 checkpoints and the classes of Hugging Face transformers.

transformers has no class for the V1-5 layout, but its `InternVLForConditionalGeneration` with a
Llama decoder computes the same function once the tensors are renamed and split. Training, the
evaluation and the numerical tests all go through the four functions of this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
)

State = dict[str, torch.Tensor]

VISION, PROJECTOR, DECODER = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.language_model.",
)
TOP_NAMES = {  # V1-5 name: transformers name
    "vision_model.embeddings.class_embedding": VISION + "embeddings.cls_token",
    "vision_model.embeddings.position_embedding": VISION + "embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.": VISION + "embeddings.patch_embeddings.projection.",
    "mlp1.0.": PROJECTOR + "layer_norm.",
    "mlp1.1.": PROJECTOR + "linear_1.",
    "mlp1.3.": PROJECTOR + "linear_2.",
    "language_model.model.tok_embeddings.": DECODER + "embed_tokens.",
    "language_model.model.norm.": DECODER + "norm.",
    "language_model.output.": "lm_head.",
}
VISION_NAMES = {  # inside one encoder layer
    "attn.proj.": "attention.projection_layer.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "mlp.": "mlp.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
DECODER_NAMES = {  # inside one decoder layer
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "attention_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
}
QKV = ("q_proj", "k_proj", "v_proj")


def _vision_config(config: dict[str, Any]) -> InternVLVisionConfig:
    """The tower's configuration; missing keys take the defaults of the V1-5 config class."""
    vision = config["vision_config"]
    return InternVLVisionConfig(
        hidden_size=vision.get("hidden_size", 3200),
        num_hidden_layers=vision.get("num_hidden_layers", 48),
        num_attention_heads=vision.get("num_attention_heads", 25),
        intermediate_size=vision.get("intermediate_size", 12800),
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 14),
        num_channels=vision.get("num_channels", 3),
        attention_bias=vision.get("qkv_bias", False),
        use_qk_norm=vision.get("qk_normalization", True),
        norm_type=vision.get("norm_type", "rms_norm"),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        hidden_act=vision.get("hidden_act", "gelu"),
        layer_scale_init_value=vision.get("initializer_factor", 0.1),
        use_mean_pooling=True,  # not a pooling switch here: it turns the final layer norm off
    )


def _text_config(config: dict[str, Any]) -> LlamaConfig:
    """The Llama configuration that computes the same function as the InternLM2 decoder."""
    text = config["llm_config"]
    kind = text.get("architectures", ["InternLM2ForCausalLM"])[0]
    if kind != "InternLM2ForCausalLM":
        raise ValueError(
            f"llm_config.architectures is {kind}; only InternLM2ForCausalLM is bridged"
        )
    heads = text.get("num_attention_heads", 32)
    scaling = text.get("rope_scaling")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(text.get("rope_theta", 10000)),
    }
    if scaling:
        rope |= {"rope_type": scaling["type"], "factor": float(scaling["factor"])}
    return LlamaConfig(
        vocab_size=text.get("vocab_size", 103168),
        hidden_size=text.get("hidden_size", 4096),
        intermediate_size=text.get("intermediate_size", 11008),
        num_hidden_layers=text.get("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        hidden_act=text.get("hidden_act", "silu"),
        max_position_embeddings=text.get("max_position_embeddings", 2048),
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        attention_bias=text.get("bias", True),
        rope_parameters=rope,
        bos_token_id=text.get("bos_token_id", 1),
        eos_token_id=text.get("eos_token_id", 2),
        pad_token_id=text.get("pad_token_id", 0),
        tie_word_embeddings=False,
    )


def hf_config(config: dict[str, Any], image_token_id: int | None = None) -> InternVLConfig:
    """Translate a V1-5 `config.json`.

    image_token_id: id of `<IMG_CONTEXT>`; by default the third of the nine pieces that end the
    vocabulary, which is where every InternLM2 checkpoint of the family has it.
    """
    if config.get("ps_version", "v1") != "v2":
        raise ValueError("ps_version is v1; transformers has pixel shuffle v2 only")
    vision, text = _vision_config(config), _text_config(config)
    ratio = config.get("downsample_ratio", 0.5)
    size = config.get("force_image_size") or vision.image_size[0]
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size - 7 if image_token_id is None else image_token_id,
        image_seq_length=int((size // vision.patch_size[0]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=False,
    )


def hf_model(config: dict[str, Any], attention: str = "eager") -> InternVLForConditionalGeneration:
    """A randomly initialised float32 model in evaluation mode; attention is `eager` or `sdpa`."""
    model = InternVLForConditionalGeneration._from_config(
        hf_config(config), attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def _fuse_wqkv(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dim: int
) -> torch.Tensor:
    """(heads*dim, ...), 2 x (kv*dim, ...) -> ((heads + 2 kv)*dim, ...), one block per KV head."""
    groups = key.shape[0] // dim
    parts = [x.reshape(groups, -1, dim, *x.shape[1:]) for x in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, *query.shape[1:])


def _split_wqkv(fused: torch.Tensor, groups: int, dim: int) -> tuple[torch.Tensor, ...]:
    """The inverse of `_fuse_wqkv`: query, key and value rows of `groups` KV heads."""
    blocks = fused.reshape(groups, -1, dim, *fused.shape[1:])
    parts = blocks.split([blocks.shape[1] - 2, 1, 1], dim=1)
    return tuple(x.reshape(-1, *fused.shape[1:]) for x in parts)


def _names(config: InternVLConfig) -> dict[str, str]:
    """V1-5 prefix -> transformers prefix, for everything but the two fused projections."""
    names = dict(TOP_NAMES)
    for layer in range(config.vision_config.num_hidden_layers):
        for old, new in VISION_NAMES.items():
            names[f"vision_model.encoder.layers.{layer}.{old}"] = (
                f"{VISION}encoder.layer.{layer}.{new}"
            )
    for layer in range(config.text_config.num_hidden_layers):
        for old, new in DECODER_NAMES.items():
            names[f"language_model.model.layers.{layer}.{old}"] = f"{DECODER}layers.{layer}.{new}"
    return names


def _fused(config: InternVLConfig) -> dict[str, tuple[str, str]]:
    """V1-5 prefix of a fused projection -> (transformers prefix of its parts, which model)."""
    vision = {
        f"vision_model.encoder.layers.{n}.attn.qkv.": (
            f"{VISION}encoder.layer.{n}.attention.",
            "vision",
        )
        for n in range(config.vision_config.num_hidden_layers)
    }
    text = {
        f"language_model.model.layers.{n}.attention.wqkv.": (
            f"{DECODER}layers.{n}.self_attn.",
            "text",
        )
        for n in range(config.text_config.num_hidden_layers)
    }
    return vision | text


def _head_shape(config: InternVLConfig) -> tuple[int, int]:
    """(KV heads, lanes per head) of the decoder."""
    text = config.text_config
    return text.num_key_value_heads, text.hidden_size // text.num_attention_heads


def to_v15(model: InternVLForConditionalGeneration) -> State:
    """The model's weights under the names and in the shapes of a V1-5 checkpoint."""
    source = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    _, dim = _head_shape(model.config)
    state: State = {}
    for old, new in _names(model.config).items():
        for name in [name for name in source if name.startswith(new)]:
            state[old + name.removeprefix(new)] = source.pop(name)
    for old, (prefix, kind) in _fused(model.config).items():
        for leaf in ("weight", "bias"):
            if f"{prefix}q_proj.{leaf}" in source:
                parts = [source.pop(f"{prefix}{name}.{leaf}") for name in QKV]
                state[old + leaf] = (
                    torch.cat(parts) if kind == "vision" else _fuse_wqkv(*parts, dim)
                )
    if source:
        raise ValueError(f"no V1-5 name for {sorted(source)[:5]}")
    return {name: state[name].contiguous().clone() for name in sorted(state)}


def load_v15(model: InternVLForConditionalGeneration, state: State) -> None:
    """Copy a V1-5 state into the model; missing, unknown or misshapen tensors are errors."""
    state = dict(state)
    groups, dim = _head_shape(model.config)
    target: State = {}
    for old, new in _names(model.config).items():
        for name in [name for name in state if name.startswith(old)]:
            target[new + name.removeprefix(old)] = state.pop(name)
    for old, (prefix, kind) in _fused(model.config).items():
        for leaf in ("weight", "bias"):
            if old + leaf in state:
                fused = state.pop(old + leaf)
                parts = fused.chunk(3) if kind == "vision" else _split_wqkv(fused, groups, dim)
                target |= {
                    f"{prefix}{name}.{leaf}": part for name, part in zip(QKV, parts, strict=True)
                }
    if state:
        raise ValueError(f"tensors without a place in the model: {sorted(state)[:5]}")
    model.load_state_dict(
        {name: tensor.contiguous() for name, tensor in target.items()}, strict=True
    )


def load_checkpoint(
    directory: str | Path, attention: str = "eager"
) -> InternVLForConditionalGeneration:
    """Read a V1-5 checkpoint directory (sharded or not) into a float32 model."""
    directory = Path(directory)
    model = hf_model(json.loads((directory / "config.json").read_text()), attention)
    state: State = {}
    for shard in sorted(directory.glob("*.safetensors")):
        state |= load_file(shard)
    load_v15(model, state)
    return model
