"""The vision tower through llama.cpp's mtmd library: written as its files, and run.

The library takes a tower together with a text model of the same width: an empty one is written
beside it, whose tokenizer knows bytes only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.peers.layout import Tensor, read_tensor
from internvl_edge.bench.peers.llamacpp import quiet_log, silence, system_info
from internvl_edge.bundle.errors import BundleError, LimitError, MeasurementError
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.specs import ModelSpec, VisionSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.names import encoder_prefix

TEXT, TOWER = "text.gguf", "mmproj.gguf"
#: The only tower that the library runs with RMSNorm: it knows it by width and layers.
LARGE = (3200, 45)

_OUTSIDE = {
    "vision.class_embedding": "v.class_embd",
    "vision.position_embedding": "v.position_embd.weight",
    "vision.patch_embedding.weight": "v.patch_embd.weight",
    "vision.patch_embedding.bias": "v.patch_embd.bias",
    "projector.norm.weight": "mm.model.mlp.0.weight",
    "projector.norm.bias": "mm.model.mlp.0.bias",
    "projector.fc1.weight": "mm.model.mlp.1.weight",
    "projector.fc1.bias": "mm.model.mlp.1.bias",
    "projector.fc2.weight": "mm.model.mlp.3.weight",
    "projector.fc2.bias": "mm.model.mlp.3.bias",
}
_INSIDE = {
    "proj": "attn_out",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "norm1": "ln1",
    "norm2": "ln2",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}


def write_mtmd(source: WeightSource, directory: Path) -> Path:
    """Write the tower with its projector in float16, and an empty text model.

    Args:
        directory: to create.

    Raises:
        LimitError: a tower that the library would compute otherwise.
        CheckpointError: a value is NaN or infinite.
        RangeError: a finite value does not fit float16.
    """
    vision = source.spec.vision
    if vision.norm_type == "rms_norm" and (vision.hidden_size, vision.num_hidden_layers) != LARGE:
        raise LimitError(
            f"llama.cpp knows a tower with RMSNorm by its {LARGE[1]} layers of {LARGE[0]} only"
        )
    directory.mkdir()
    _write_text(source.spec, directory / TEXT)
    _write_tower(source, directory / TOWER)
    return directory


def _write_tower(source: WeightSource, path: Path) -> None:
    from gguf import GGUFType, GGUFWriter

    spec = source.spec
    vision = spec.vision
    writer = GGUFWriter(path, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("internvl")
    writer.add_vision_projection_dim(spec.language.hidden_size)
    writer.add_vision_image_size(vision.tile_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([0.485, 0.456, 0.406])
    writer.add_vision_image_std([0.229, 0.224, 0.225])
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(2)
    for tensor in _tower_tensors(source):
        # What is added, or normed, stays in float32, as llama.cpp's own converter leaves it.
        half = len(tensor.shape) > 1 and "_embd" not in tensor.name
        half = half or tensor.name == "v.patch_embd.weight"
        writer.add_tensor(
            tensor.name, read_tensor(source, tensor, "float16" if half else "float32")
        )
    _write(writer)


def _tower_tensors(source: WeightSource) -> Iterator[Tensor]:
    vision = source.spec.vision
    for ours, name in _OUTSIDE.items():
        yield Tensor(name, ours, source.shape(ours))
    for layer in range(vision.num_hidden_layers):
        yield from _layer_tensors(source, vision, encoder_prefix(layer), f"v.blk.{layer}.")


def _layer_tensors(
    source: WeightSource, vision: VisionSpec, here: str, there: str
) -> Iterator[Tensor]:
    width = vision.hidden_size
    for part, letter in enumerate("qkv"):
        rows = np.arange(part * width, (part + 1) * width)
        for leaf in ("weight", "bias") if vision.qkv_bias else ("weight",):
            ours = f"{here}qkv.{leaf}"
            shape = (width, *source.shape(ours)[1:])
            yield Tensor(f"{there}attn_{letter}.{leaf}", ours, shape, rows)
    for ours, name in _INSIDE.items():
        if name.endswith("_norm") and not vision.qk_normalization:
            continue
        whole = name.startswith("ln") and vision.norm_type != "layer_norm"
        leaves = ("weight",) if whole or name.endswith("_norm") else ("weight", "bias")
        for leaf in leaves:
            inside = f"{here}{ours}.{leaf}"
            yield Tensor(f"{there}{name}.{leaf}", inside, source.shape(inside))
    for scale in ("ls1", "ls2"):
        yield Tensor(f"{there}{scale}.weight", f"{here}{scale}", (width,))


def _write_text(spec: ModelSpec, path: Path) -> None:
    """A decoder of one layer, all zeros, as wide as the model's."""
    from gguf import GGUFWriter, TokenType

    width, head, narrow = spec.language.hidden_size, 64, 64
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(narrow)
    writer.add_head_count(width // head)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    shapes = {
        "token_embd": (len(tokens), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (head, width),
        "blk.0.attn_v": (head, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (narrow, width),
        "blk.0.ffn_up": (narrow, width),
        "blk.0.ffn_down": (width, narrow),
    }
    for name, shape in shapes.items():
        dtype = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype))
    _write(writer)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class MtmdTower:
    """llama.cpp's mtmd over a folder of `write_mtmd`; a picture is one tile."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._api, self._llama = mtmd_cpp, llama_cpp
        silence()
        for set_log in (mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
            set_log(quiet_log(), ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._text = llama_cpp.llama_model_load_from_file(str(path / TEXT).encode(), params)
        if not self._text:
            raise BundleError(f"llama.cpp does not take {named(path / TEXT)}")
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.n_threads = False, False, threads
        self._context = mtmd_cpp.mtmd_init_from_file(
            str(path / TOWER).encode(), self._text, settings
        )
        if not self._context:
            raise BundleError(f"llama.cpp does not take {named(path / TOWER)}")
        self._width = llama_cpp.llama_model_n_embd(self._text)

    @property
    def features(self) -> str:
        return f"float16; {system_info()}"

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.floating]:
        """See `towers.Tower`."""
        return np.concatenate([self._encode(tile) for tile in tiles])

    def _encode(self, tile: NDArray[np.uint8]) -> NDArray[np.float32]:
        api = self._api
        pixels = np.ascontiguousarray(tile)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = api.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data)
        chunks = api.mtmd_input_chunks_init()
        marker = api.mtmd_default_marker()
        text = api.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        try:
            if api.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1):
                raise MeasurementError("llama.cpp's mtmd refused a tile")
            found = [
                self._rows(api.mtmd_input_chunks_get(chunks, i))
                for i in range(api.mtmd_input_chunks_size(chunks))
            ]
        finally:
            api.mtmd_input_chunks_free(chunks)
            api.mtmd_bitmap_free(bitmap)
        return np.concatenate([rows for rows in found if rows is not None])

    def _rows(self, chunk: Any) -> NDArray[np.float32] | None:
        """Rows of an image chunk; None of text."""
        api = self._api
        if api.mtmd_input_chunk_get_type(chunk) != api.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            return None
        if status := api.mtmd_encode_chunk(self._context, chunk):
            raise MeasurementError(f"llama.cpp's mtmd did not encode a tile ({status})")
        count = api.mtmd_input_chunk_get_n_tokens(chunk)
        rows = np.ctypeslib.as_array(api.mtmd_get_output_embd(self._context), (count, self._width))
        return rows.copy()
