"""The language part of a checkpoint as a text model that transformers and Optimum load."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
from safetensors.numpy import save_file

from internvl_edge.bench.peers.layout import TRANSFORMERS, llama_tensors, peer_kind, read_tensor
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.checkpoint import INDEX, WeightSource


def write_llama(source: WeightSource, directory: Path) -> Path:
    """Write config.json and bfloat16 shards, one tensor each: one is held in memory at a time.

    Args:
        directory: to create.

    Raises:
        LimitError: the decoder is of no kind that peers know; see `peer_kind`.
    """
    config = json.dumps(llama_config(source.spec.language), indent=2)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config, encoding="utf-8")
    places = {}
    for number, tensor in enumerate(llama_tensors(source, TRANSFORMERS)):
        file = f"model-{number:05d}.safetensors"
        values = read_tensor(source, tensor, "float32").astype(ml_dtypes.bfloat16)
        save_file({tensor.name: values}, directory / file, metadata={"format": "pt"})
        places[tensor.name] = file
    index = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
    (directory / INDEX).write_text(index, encoding="utf-8")
    return directory


def llama_config(spec: LanguageSpec) -> dict[str, object]:
    """config.json of the decoder that computes the same function up to the trained length.

    Raises:
        LimitError: see `peer_kind`.
    """
    kind = peer_kind(spec)
    scaling = None
    if spec.rope_type == "linear":
        scaling = {"rope_type": "linear", "factor": spec.rope_factor}
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "attention_bias": spec.bias,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_key_value_heads": spec.num_key_value_heads,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": spec.vocab_size,
    }
