"""Random checkpoints in the InternVL-Chat-V1-5 layout, for tests that need one of any shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.checkpoint.origin import stored_shapes
from internvl_edge.runtime.backends.int8_cache import takes_int8_cache

GOLDEN = Path(__file__).with_name("golden")
#: The newest onnxruntime for Python 3.10 has no int8 cache: nothing to ask for there.
KV8: dict[str, str] = {"kv": "int8"} if takes_int8_cache() else {}
BF16 = np.dtype(ml_dtypes.bfloat16)
#: Values drawn at a time: a whole matrix of float32 would be pages that are used once.
RUN = 1 << 18


def small_config(
    *,
    vision_kind: str = "6b",
    hidden: int = 64,
    vision_hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vision_heads: int = 2,
    layers: int = 2,
    vision_layers: int = 2,
    tile: int = 56,
    **top_level: Any,
) -> dict[str, Any]:
    """A config.json of a small model that fits the golden tokenizer (512 ids).

    vision_kind "6b" is RMSNorm with QK norm, "300m" is LayerNorm with qkv bias.
    """
    large = vision_kind == "6b"
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": tile,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "use_thumbnail": True,
        "vision_config": {
            "hidden_size": vision_hidden,
            "intermediate_size": 3 * vision_hidden,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": tile,
            "patch_size": 14,
            "norm_type": "rms_norm" if large else "layer_norm",
            "qk_normalization": large,
            "qkv_bias": not large,
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "max_position_embeddings": 512,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "vocab_size": 512,
        },
        **top_level,
    }


def checkpoint_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a checkpoint with this config holds, by its own names."""
    described = describe_config(config)
    return stored_shapes(described.tensors(), tensor_shapes(described.spec))


def random_state(config: dict[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights that keep activations near one: matrices by fan-in, norms around one."""
    return dict(drawn_tensors(config, np.dtype(np.float32), seed))


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: np.dtype[Any] = BF16,
    shards: int = 1,
) -> Path:
    """Write config, tokenizer and weights, one shard in memory at a time."""
    write_config(directory, config)
    names = sorted(checkpoint_shapes(config))
    per_shard = -(-len(names) // shards)
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = set(names[shard * per_shard : (shard + 1) * per_shard])
        state = dict(drawn_tensors(config, dtype, seed, chosen))
        total += sum(value.nbytes for value in state.values())
        weight_map |= dict.fromkeys(state, file)
        save_file(state, directory / (file if shards > 1 else "model.safetensors"))
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """config.json and the golden tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copyfile(GOLDEN / "model" / name, directory / name)


def drawn_tensors(
    config: dict[str, Any], dtype: np.dtype[Any], seed: int = 0, chosen: set[str] | None = None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The weights of a checkpoint, by its own names, one in memory at a time."""
    for index, (name, shape) in enumerate(checkpoint_shapes(config).items()):
        if chosen is not None and name not in chosen:
            continue
        random = np.random.default_rng([seed, index])
        tensor = np.empty(shape, dtype)
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, RUN):
            values = random.standard_normal(min(RUN, flat.size - start), np.float32)
            flat[start : start + RUN] = _scaled(values, name, shape)
        yield name, tensor


def _scaled(values: NDArray[np.float32], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if len(shape) > 1:
        values *= np.prod(shape[1:]) ** -0.5 if "embed" not in name else 1
        return values
    if "norm" in name or name.endswith(("mlp1.0.weight", "ls1", "ls2")):
        return 1 + 0.2 * values if name.endswith("weight") else 0.5 + 0.1 * values
    return 0.1 * values
