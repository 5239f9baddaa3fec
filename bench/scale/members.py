"""Every published checkpoint of a supported kind: what its weights' shapes follow from.

Sizes are those of the released config.json. A family's suffixes (`-MPO`, `-Instruct`,
`-Pretrained`, `-hf`) have the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.config import parse_config

_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "300M": {
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "qk_normalization": False,
        "qkv_bias": True,
    },
    "6B": {"num_hidden_layers": 45, "image_size": 448},
}
_INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "vocab_size": 92553,
}
_YI = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000,
    "vocab_size": 64009,
}
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "vocab_size": 128265,
}
#: The divisors of its longrope are not the released ones: shapes do not depend on them.
_PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "sliding_window": 262144,
    "vocab_size": 32020,
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "use_sliding_window": False,
    "vocab_size": 151674,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}

_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def _dynamic(factor: float) -> dict[str, Any]:
    return {"rope_scaling": {"type": "dynamic", "factor": factor}}


@dataclass(frozen=True)
class Decoder:
    """A decoder's family and sizes: width, MLP, layers, heads, heads of keys and values."""

    family: Mapping[str, Any]
    sizes: tuple[int, int, int, int, int]

    def config(self) -> dict[str, Any]:
        """Return its section of config.json."""
        keys = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        return {**self.family, **dict(zip(keys, self.sizes, strict=True))}


_INTERNLM2_2B = Decoder(_INTERNLM2 | _dynamic(2), (2048, 8192, 24, 16, 8))
_INTERNLM2_7B = Decoder(_INTERNLM2 | _dynamic(2), (4096, 14336, 32, 32, 8))
_INTERNLM2_20B = Decoder(_INTERNLM2 | _dynamic(3), (6144, 16384, 48, 48, 8))
_INTERNLM3_8B = {"rope_theta": 50000000, "vocab_size": 128521} | _dynamic(6)
_YI_34B = Decoder(_YI, (7168, 20480, 60, 56, 8))
_PHI3_MINI = Decoder(_PHI3, (3072, 8192, 32, 32, 32))

_QWEN2_SIZES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "3B": (2048, 11008, 36, 16, 2),
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}


def _qwen2(size: str, **changed: Any) -> Decoder:
    return Decoder({**_QWEN2, **changed}, _QWEN2_SIZES[size])


def _qwen3(*sizes: int) -> Decoder:
    width, mlp, layers, heads, kv_heads = sizes
    return Decoder(_QWEN3, (width, mlp, layers, heads, kv_heads))


def _qwen3_moe(*sizes: int) -> Decoder:
    width, expert, layers, heads, kv_heads = sizes
    family = _QWEN3_MOE | {"moe_intermediate_size": expert}
    return Decoder(family, (width, 3 * width, layers, heads, kv_heads))


#: Name, tower, template, decoder.
_MEMBERS: tuple[tuple[str, str, str, Decoder], ...] = (
    ("internvl-chat-v1-2", "6B", "Hermes-2", _YI_34B),
    ("internvl-chat-v1-5", "6B", "internlm2-chat", _INTERNLM2_20B),
    ("mini-internvl-chat-2b-v1-5", "300M", "internlm2-chat", _INTERNLM2_2B),
    ("mini-internvl-chat-4b-v1-5", "300M", "phi3-chat", _PHI3_MINI),
    ("internvl2-1b", "300M", "Hermes-2", _qwen2("0.5B", vocab_size=151655)),
    ("internvl2-2b", "300M", "internlm2-chat", _INTERNLM2_2B),
    ("internvl2-4b", "300M", "phi3-chat", _PHI3_MINI),
    ("internvl2-8b", "300M", "internlm2-chat", _INTERNLM2_7B),
    ("internvl2-26b", "6B", "internlm2-chat", _INTERNLM2_20B),
    ("internvl2-40b", "6B", "Hermes-2", _YI_34B),
    ("internvl2-llama3-76b", "6B", "internlm2-chat", Decoder(_LLAMA3, (8192, 28672, 80, 64, 8))),
    ("internvl2_5-1b", "300M", "internvl2_5", _qwen2("0.5B")),
    ("internvl2_5-2b", "300M", "internvl2_5", _INTERNLM2_2B),
    ("internvl2_5-4b", "300M", "internvl2_5", _qwen2("3B")),
    ("internvl2_5-8b", "300M", "internvl2_5", _INTERNLM2_7B),
    ("internvl2_5-26b", "6B", "internvl2_5", _INTERNLM2_20B),
    ("internvl2_5-38b", "6B", "internvl2_5", _qwen2("32B")),
    ("internvl2_5-78b", "6B", "internvl2_5", _qwen2("72B")),
    ("internvl3-1b", "300M", "internvl2_5", _qwen2("0.5B", **_dynamic(2))),
    ("internvl3-2b", "300M", "internvl2_5", _qwen2("1.5B", **_dynamic(2))),
    ("internvl3-8b", "300M", "internvl2_5", _qwen2("7B", **_dynamic(2))),
    (
        "internvl3-9b",
        "300M",
        "internvl2_5",
        Decoder(_INTERNLM2 | _INTERNLM3_8B, (4096, 10240, 48, 32, 2)),
    ),
    ("internvl3-14b", "300M", "internvl2_5", _qwen2("14B", **_dynamic(2))),
    ("internvl3-38b", "6B", "internvl2_5", _qwen2("32B", **_dynamic(2))),
    ("internvl3-78b", "6B", "internvl2_5", _qwen2("72B", **_dynamic(2))),
    ("internvl3_5-1b", "300M", "internvl2_5", _qwen3(1024, 3072, 28, 16, 8)),
    ("internvl3_5-2b", "300M", "internvl2_5", _qwen3(2048, 6144, 28, 16, 8)),
    ("internvl3_5-4b", "300M", "internvl2_5", _qwen3(2560, 9728, 36, 32, 8)),
    ("internvl3_5-8b", "300M", "internvl2_5", _qwen3(4096, 12288, 36, 32, 8)),
    ("internvl3_5-14b", "300M", "internvl2_5", _qwen3(5120, 17408, 40, 40, 8)),
    ("internvl3_5-38b", "6B", "internvl2_5", _qwen3(5120, 25600, 64, 64, 8)),
    ("internvl3_5-30b-a3b", "300M", "internvl2_5", _qwen3_moe(2048, 768, 48, 32, 4)),
    ("internvl3_5-241b-a28b", "6B", "internvl2_5", _qwen3_moe(4096, 1536, 94, 64, 4)),
)


def _configs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, tower, template, decoder in _MEMBERS:
        yield (
            name,
            {
                "architectures": ["InternVLChatModel"],
                "model_type": "internvl_chat",
                "force_image_size": 448,
                "dynamic_image_size": True,
                "max_dynamic_patch": 12,
                "use_thumbnail": True,
                "ps_version": "v2",
                "template": template,
                "vision_config": dict(_TOWERS[tower]),
                "llm_config": decoder.config(),
            },
        )


#: The first with its decoder: one tile a picture, and the first order of pixel shuffle.
_UNTILED = {"ps_version": "v1", "dynamic_image_size": False, "use_thumbnail": False}

#: config.json by name.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    name: config | (_UNTILED if name == "internvl-chat-v1-2" else {}) for name, config in _configs()
}


def internvl_1_5() -> ModelSpec:
    """InternViT-6B and InternLM2-20B as released."""
    return parse_config(CONFIGS["internvl-chat-v1-5"])
