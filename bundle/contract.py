"""The contract between `export`, which writes graphs, and the backends, which run them.

Every tensor name, shape and dtype that crosses the boundary is defined here and nowhere else.
A dimension given as a string is symbolic (any size).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from internvl_edge.bundle.specs import LanguageSpec, VisionSpec

VisionPrecision = Literal["fp32", "fp16", "int8"]
LanguagePrecision = Literal["fp32", "fp16", "int8", "int4"]
CachePrecision = Literal["fp32", "fp16", "int8"]

#: Who the graphs are written for: ONNX Runtime; TensorRT 10.15 and later (RTX, JetPack 7.2);
#: TensorRT 10.3 (JetPack 6.1 and 6.2).
DialectName = Literal["onnxruntime", "tensorrt", "tensorrt-portable"]

#: Head sizes that ONNX Runtime's attention rotates itself; others are rotated before it.
ROTARY_MULTIPLE = 16


@dataclass(frozen=True)
class DialectTraits:
    """What graphs of a dialect take and give, and how they store what they hold.

    Attributes:
        engines: whether they run from engines that TensorRT builds on a GPU; ONNX Runtime opens
            others itself, and runs these on the CPU as reference.
        modern: whether TensorRT's parser must be of 10.15 or later.
        integers_compute: NumPy dtype name of the activations around integer weights.
        cache_in_place: whether the cache is given whole, in the buffer it was taken from; if not,
            only the new rows, to be put there.
        int8_cache: whether the cache may hold integers.
        half_cache: whether it may hold float16 beside a decoder that computes in float32.
        layer_dtypes: whether single layers of a float16 graph are kept in float32.
        row_scales: whether weights of 8 bits alone have one scale a row, whatever the block.
        integer_bias: whether a W8A8 product takes an int32 bias and, as its scales, LayerScale.
        wide_vectors: whether norms, positions and LayerScale stay float32 in a float16 graph.
        batched: whether stored graphs take several sequences side by side; see `language_inputs`.
    """

    engines: bool
    modern: bool = False
    integers_compute: str = "float16"
    cache_in_place: bool = True
    int8_cache: bool = True
    half_cache: bool = False
    layer_dtypes: bool = True
    row_scales: bool = True
    integer_bias: bool = False
    wide_vectors: bool = True
    batched: bool = True

    def caches(self, computed: CachePrecision) -> list[CachePrecision]:
        """Return the precisions of a cache beside keys and values computed so, that first."""
        halves: list[CachePrecision] = ["fp16"] if self.half_cache else []
        integers: list[CachePrecision] = ["int8"] if self.int8_cache else []
        return list(dict.fromkeys([computed, *halves, *integers]))


DIALECTS: Mapping[DialectName, DialectTraits] = {
    "onnxruntime": DialectTraits(
        engines=False,
        integers_compute="float32",
        half_cache=True,
        layer_dtypes=False,
        row_scales=False,
        integer_bias=True,
        wide_vectors=False,
        batched=False,
    ),
    "tensorrt": DialectTraits(engines=True, modern=True, int8_cache=False),
    "tensorrt-portable": DialectTraits(engines=True, cache_in_place=False),
}

#: NumPy dtype name of stored keys and values.
CACHE_DTYPE: dict[CachePrecision, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}

VISION_GRAPH = "vision.onnx"
LANGUAGE_GRAPH = "language.onnx"
VISION_FILES = (VISION_GRAPH, "vision.data")
LANGUAGE_FILES = (LANGUAGE_GRAPH, "language.data")
EMBEDDING_TABLE = "embedding.npy"
EMBEDDING_SCALES = "embedding.scales.npy"
MANIFEST = "bundle.json"
#: Values of an int8 table's row that share a scale, where a row is whole runs of them.
EMBEDDING_RUN = 128
QUANTISATION_REPORT = "quantisation.json"
QUANTISATION_PLOT = "quantisation.svg"

TILES = "tiles"
IMAGE_EMBEDDINGS = "image_embeddings"

EMBEDDINGS = "embeddings"
ROPE_COS = "rope.cos"
ROPE_SIN = "rope.sin"
LAST_POSITION = "last_position"
TOTAL_LENGTH = "total_length"
POSITIONS = "positions"
KEY_POSITIONS = "key_positions"
LOGIT_ROWS = "logit_rows"
LOGITS = "logits"

#: The dimension of what each sequence has of its own, where a pass takes several.
BATCH = "sequences"


_DECODER, _TOWER = "language_model.model.", "vision_model.encoder."
#: How canonical names of a model's tensors (`export.checkpoint.names`) begin, and what bundles have
#: in the place of that: InternLM2's spelling, for every family.
_STORED_NAMES = (
    (r"vision\.(layers\.\d+\.)(qkv|q_norm|k_norm|proj)\.", rf"{_TOWER}\1attn.\2."),
    (r"vision\.(layers\.\d+\.)(fc[12])\.", rf"{_TOWER}\1mlp.\2."),
    (r"vision\.layers\.", f"{_TOWER}layers."),
    (r"vision\.", "vision_model.embeddings."),
    (r"projector\.norm\.", "mlp1.0."),
    (r"projector\.fc1\.", "mlp1.1."),
    (r"projector\.fc2\.", "mlp1.3."),
    (r"projector\.", "mlp1."),
    (r"(layers\.\d+\.)qkv\.", rf"{_DECODER}\1attention.wqkv."),
    (r"(layers\.\d+\.)([qk]_norm)\.", rf"{_DECODER}\1attention.\2."),
    (r"(layers\.\d+\.)out\.", rf"{_DECODER}\1attention.wo."),
    (r"(layers\.\d+\.)(router|experts_gated|experts_down)\.", rf"{_DECODER}\1feed_forward.\2."),
    (r"(layers\.\d+\.)gate\.", rf"{_DECODER}\1feed_forward.w1."),
    (r"(layers\.\d+\.)up\.", rf"{_DECODER}\1feed_forward.w3."),
    (r"(layers\.\d+\.)down\.", rf"{_DECODER}\1feed_forward.w2."),
    (r"layers\.", f"{_DECODER}layers."),
    (r"embedding\.weight", f"{_DECODER}tok_embeddings.weight"),
    (r"norm\.weight", f"{_DECODER}norm.weight"),
    (r"head\.", "language_model.output."),
)


def stored_name(name: str) -> str:
    """Return what graphs and reports of a bundle call a tensor, or tensors that begin so.

    Args:
        name: canonical; another is returned as it is.
    """
    for pattern, stored in _STORED_NAMES:
        renamed, count = re.subn(rf"\A{pattern}", stored, name)
        if count:
            return renamed
    return name


def past_key(layer: int) -> str:
    return f"past.{layer}.key"


def past_value(layer: int) -> str:
    return f"past.{layer}.value"


def present_key(layer: int) -> str:
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    return f"present.{layer}.value"


def cache_pairs(spec: LanguageSpec) -> list[tuple[str, str]]:
    """Names of past and present of every cache: layer by layer, keys before values."""
    return [
        pair
        for layer in range(spec.num_hidden_layers)
        for pair in (
            (past_key(layer), present_key(layer)),
            (past_value(layer), present_value(layer)),
        )
    ]


def embedding_runs(hidden_size: int) -> int:
    """Return the number of scales of one row of an int8 embedding table."""
    return hidden_size // EMBEDDING_RUN if hidden_size % EMBEDDING_RUN == 0 else 1


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its shape where symbolic dimensions have these sizes."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.shape)


def vision_inputs(spec: VisionSpec) -> list[Tensor]:
    """RGB tiles as they were cut; normalisation is part of the graph."""
    return [Tensor(TILES, "uint8", ("tiles", spec.tile_size, spec.tile_size, 3))]


def compute_dtype(precision: LanguagePrecision, dialect: DialectName = "onnxruntime") -> str:
    """NumPy dtype name of the activations of a graph whose linear weights have this precision.

    ONNX Runtime's integer kernels take and give float32, TensorRT's float16.
    """
    floats = {"fp32": "float32", "fp16": "float16"}
    return floats.get(precision, DIALECTS[dialect].integers_compute)


def vision_outputs(
    spec: VisionSpec,
    language: LanguageSpec,
    precision: VisionPrecision,
    dialect: DialectName = "onnxruntime",
) -> list[Tensor]:
    shape = ("tiles", spec.tokens_per_tile, language.hidden_size)
    return [Tensor(IMAGE_EMBEDDINGS, compute_dtype(precision, dialect), shape)]


def default_cache(
    language: LanguagePrecision, dialect: DialectName = "onnxruntime"
) -> CachePrecision:
    """Keys and values as they are computed."""
    return "fp16" if compute_dtype(language, dialect) == "float16" else "fp32"


def rope_dtype(
    precision: LanguagePrecision, cache: CachePrecision, dialect: DialectName = "onnxruntime"
) -> str:
    """NumPy dtype name of the rotary tables: attention's, which is that of a float16 cache."""
    return "float16" if cache == "fp16" else compute_dtype(precision, dialect)


def language_inputs(
    spec: LanguageSpec,
    precision: LanguagePrecision,
    cache: CachePrecision,
    dialect: DialectName = "onnxruntime",
    batched: bool | None = None,
) -> list[Tensor]:
    """Return what the language graph takes: `tokens` rows that are appended to KV caches.

    A KV cache has a fixed `context` length. The rotary tables are inputs because dynamic NTK
    scaling makes them depend on the total length. Where the rows stand is told in the dialect's
    way: ONNX Runtime's attention takes the total length; TensorRT's graphs take `positions`, and
    with `key_positions` (0, 1, ... up to any number that is enough) how far caches are read.

    Args:
        batched: whether the rows are of several `sequences`, as many of `each`, one after the
            other, each sequence with a cache of its own, and for TensorRT with rotary tables of its
            own; None: as the dialect is written today.
    """
    batch = _batch(dialect, batched)
    rope = rope_dtype(precision, cache, dialect)
    own = batch if DIALECTS[dialect].engines else ()
    table: tuple[int | str, ...] = (*own, "context", spec.head_dim // 2)
    tensors = [
        Tensor(EMBEDDINGS, compute_dtype(precision, dialect), ("tokens", spec.hidden_size)),
        Tensor(ROPE_COS, rope, table),
        Tensor(ROPE_SIN, rope, table),
        *_place(dialect, batch),
        Tensor(LOGIT_ROWS, "int64", ("rows",)),  # which of the `tokens` rows want logits
    ]
    for layer in range(spec.num_hidden_layers):
        tensors += _cache_pair(past_key(layer), past_value(layer), spec, cache, batch, "context")
    return tensors


def language_outputs(
    spec: LanguageSpec,
    cache: CachePrecision,
    dialect: DialectName = "onnxruntime",
    batched: bool | None = None,
) -> list[Tensor]:
    """Logits and the cache: whole, in the buffer of the past, so that a step writes its own rows
    and copies nothing; from the tensorrt-portable dialect only the new rows, to be put there.

    Args:
        batched: see `language_inputs`.
    """
    batch = _batch(dialect, batched)
    new = "each" if batch else "tokens"
    length = "context" if DIALECTS[dialect].cache_in_place else new
    tensors = [Tensor(LOGITS, "float32", ("rows", spec.vocab_size))]
    for layer in range(spec.num_hidden_layers):
        names = present_key(layer), present_value(layer)
        tensors += _cache_pair(*names, spec, cache, batch, length)
    return tensors


def cache_shape(spec: LanguageSpec, capacity: int, sequences: int = 1) -> tuple[int, ...]:
    """Shape of one layer's keys (or values): `(sequences, kv_heads, capacity, head_dim)`."""
    return (sequences, spec.num_key_value_heads, capacity, spec.head_dim)


def _batch(dialect: DialectName, batched: bool | None) -> tuple[str, ...]:
    """Return the dimension in front of what each sequence has of its own."""
    return (BATCH,) if (DIALECTS[dialect].batched if batched is None else batched) else ()


def _place(dialect: DialectName, batch: tuple[str, ...]) -> list[Tensor]:
    if not DIALECTS[dialect].engines:
        return [
            Tensor(LAST_POSITION, "int32", batch or (1,)),  # total length - 1, per sequence
            Tensor(TOTAL_LENGTH, "int32", ()),  # the largest
        ]
    rows = (*batch, "each") if batch else ("tokens",)
    return [Tensor(POSITIONS, "int64", rows), Tensor(KEY_POSITIONS, "int64", ("keys",))]


def _cache_pair(
    key: str,
    value: str,
    spec: LanguageSpec,
    cache: CachePrecision,
    batch: tuple[str, ...],
    length: str,
) -> list[Tensor]:
    dtype = CACHE_DTYPE[cache]
    shape = (*(batch or (1,)), spec.num_key_value_heads, length, spec.head_dim)
    return [Tensor(key, dtype, shape), Tensor(value, dtype, shape)]
