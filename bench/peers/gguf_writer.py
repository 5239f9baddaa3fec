"""The language part of a checkpoint as a GGUF file: llama.cpp's "llama", "qwen2" or "qwen3".

No tokenizer is written: token ids or embeddings are fed. Dynamic NTK scaling is not expressed in
the file, so results agree up to the trained length (`max_position_embeddings`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvl_edge.bench.peers.layout import GGUF, Tensor, llama_tensors, peer_kind, read_tensor
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource

GgufDtype = Literal["float32", "float16"]


def write_gguf(source: WeightSource, path: Path, dtype: GgufDtype = "float16") -> Path:
    """Write the file; one tensor is held in memory at a time.

    Args:
        dtype: of matrices; vectors are float32, as llama.cpp's own converter leaves them.

    Raises:
        LimitError: the decoder is of no kind that peers know; see `peer_kind`.
        CheckpointError: a value is NaN or infinite.
        RangeError: a finite value does not fit float16.
    """
    architecture = peer_kind(source.spec.language)
    from gguf import GGUFWriter

    tensors = list(llama_tensors(source, GGUF))
    writer = GGUFWriter(path, architecture)
    _describe(writer, source.spec.language)
    for tensor in tensors:
        kind = np.dtype(_dtype(tensor, dtype))
        size = int(np.prod(tensor.shape)) * kind.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, kind, size)
    written = False
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(read_tensor(source, tensor, _dtype(tensor, dtype)))
        written = True
    finally:
        writer.close()
        if not written:
            path.unlink(missing_ok=True)
    return path


def _describe(writer: Any, spec: LanguageSpec) -> None:
    """The header's fields (GGUF specification; the same for the three)."""
    from gguf import RopeScalingType

    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    if spec.rope_type == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(spec.rope_factor)


def _dtype(tensor: Tensor, dtype: GgufDtype) -> GgufDtype:
    return dtype if len(tensor.shape) > 1 else "float32"
