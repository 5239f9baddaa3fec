"""vision.onnx: uint8 tiles -> InternViT -> pixel shuffle -> projector -> image embeddings."""

from __future__ import annotations

import numpy as np
from onnx import helper

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import VisionPrecision
from internvl_edge.bundle.specs import PROJECTOR_EPS, SHUFFLE, ModelSpec, VisionSpec
from internvl_edge.export.checkpoint.names import PROJECTOR, VISION, encoder_prefix
from internvl_edge.export.checkpoint.weights import Weight, WeightReader, resample_positions
from internvl_edge.export.graphs.dialects import AttentionShape, Dialect, Linear
from internvl_edge.export.graphs.graph import GraphBuilder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_vision(
    spec: ModelSpec, dialect: Dialect, reader: WeightReader, precision: VisionPrecision
) -> None:
    """Write the whole vision graph into `dialect.graph`."""
    graph, vision = dialect.graph, spec.vision
    x = embed_tiles(vision, dialect, reader)
    for layer in range(vision.layers_run):
        x = encoder_layer(vision, dialect, reader, layer, x)
    (output,) = contract.vision_outputs(vision, spec.language, precision, dialect.name)
    graph.output(project(spec, dialect, reader, x), output)


def embed_tiles(vision: VisionSpec, dialect: Dialect, reader: WeightReader) -> str:
    """The graph's input to the tower's: `(tiles * sequence_length, hidden)`."""
    graph = dialect.graph
    (tiles,) = (graph.input(tensor) for tensor in contract.vision_inputs(vision))
    return _embeddings(vision, graph, dialect, reader, _normalise(graph, tiles, reader.dtype))


def encoder_layer(
    vision: VisionSpec, dialect: Dialect, reader: WeightReader, layer: int, x: str
) -> str:
    """One layer, `(tiles * sequence_length, hidden)` to the same."""
    with dialect.graph.scope(f"layers.{layer}"):
        return _layer(vision, dialect, reader, encoder_prefix(layer), x)


def project(spec: ModelSpec, dialect: Dialect, reader: WeightReader, x: str) -> str:
    """The tower's output to image embeddings `(tiles, tokens_per_tile, language hidden)`."""
    graph = dialect.graph
    x = _projector(spec, dialect, reader, _pixel_shuffle(spec.vision, graph, x))
    shape = graph.shape(-1, spec.vision.tokens_per_tile, spec.language.hidden_size)
    return graph.node("Reshape", [x, shape], "image_embeddings")


def _normalise(graph: GraphBuilder, tiles: str, dtype: str) -> str:
    """(pixel / 255 - mean) / std in float32, then the graph's dtype: the reference's order."""
    with graph.scope("normalise"):
        x = graph.node("Cast", [tiles], "float", {"to": _onnx_type("float32")})
        scale = graph.constant(np.float32(255).reshape(1), "pixel.max")
        mean = graph.constant(np.array(IMAGENET_MEAN, np.float32), "pixel.mean")
        std = graph.constant(np.array(IMAGENET_STD, np.float32), "pixel.std")
        x = graph.node("Div", [x, scale], "unit")
        x = graph.node("Sub", [x, mean], "centred")
        x = graph.node("Div", [x, std], "scaled")
        return graph.node("Cast", [x], "cast", {"to": _onnx_type(dtype)})


def _embeddings(
    spec: VisionSpec, graph: GraphBuilder, dialect: Dialect, reader: WeightReader, pixels: str
) -> str:
    """Patches as a matrix product, class token first, positions added: `(rows, hidden)`."""
    g, p, width = spec.grid, spec.patch_size, spec.hidden_size
    positions = resample_positions(reader.whole(f"{VISION}position_embedding")[0], g, g)
    class_row = reader.whole(f"{VISION}class_embedding")[0] + positions[:1]  # (1, hidden)
    with graph.scope("embeddings"):
        # (n, g*p, g*p, 3) -> (n, g, p, g, p, 3) -> (n, g, g, 3, p, p) -> (n*g*g, 3*p*p)
        x = graph.node("Reshape", [pixels, graph.shape(-1, g, p, g, p, 3)], "grid")
        x = graph.node("Transpose", [x], "patches", {"perm": [0, 1, 3, 5, 2, 4]})
        x = graph.node("Reshape", [x, graph.shape(-1, 3 * p * p)], "rows")
        weight = reader.tensor(f"{VISION}patch_embedding.weight", (width, 3 * p * p))
        x = dialect.linear(x, weight, reader.tensor(f"{VISION}patch_embedding.bias"), "patch")
        x = graph.cast(x, reader.dtype, "patch.cast")
        x = graph.node("Reshape", [x, graph.shape(-1, g * g, width)], "tokens")
        patch_positions = graph.weight(
            reader.computed(f"{VISION}position_embedding", positions[1:])
        )
        x = graph.node("Add", [x, patch_positions], "positioned")
        # One class row per tile: (1, 1, hidden) repeated over the tiles.
        # A Slice, for TensorRT's parser reads the whole Shape whatever its attributes say.
        sizes, first = graph.node("Shape", [pixels], "sizes"), graph.shape(0)
        count = graph.node("Slice", [sizes, first, graph.shape(1), first], "tiles")
        times = graph.node("Concat", [count, graph.shape(1, 1)], "times", {"axis": 0})
        row = graph.weight(reader.computed(f"{VISION}class_embedding", class_row[np.newaxis]))
        classes = graph.node("Expand", [row, times], "class")
        x = graph.node("Concat", [classes, x], "sequence", {"axis": 1})
        return graph.node("Reshape", [x, graph.shape(-1, width)], "output")


def _layer(spec: VisionSpec, dialect: Dialect, reader: WeightReader, prefix: str, x: str) -> str:
    """Pre-norm attention and MLP, each scaled per channel before it is added."""
    with dialect.graph.scope("attention"):
        y = _norm(spec, dialect, reader, f"{prefix}norm1", x, "norm")
        y = _attention(spec, dialect, reader, prefix, y)
        proj = _linear(reader, f"{prefix}proj", "proj", reader.tensor(f"{prefix}ls1"))
        y = dialect.linear(y, proj.weight, proj.bias, proj.name, proj.gain)
    with dialect.graph.scope("mlp"):
        y, x = _add_norm(spec, dialect, reader, f"{prefix}norm2", (x, y))
        up = _linear(reader, f"{prefix}fc1", "fc1")
        down = _linear(reader, f"{prefix}fc2", "fc2", reader.tensor(f"{prefix}ls2"))
        y = dialect.gelu_mlp(y, up, down)
        return dialect.add(x, y, "output")


def _attention(
    spec: VisionSpec, dialect: Dialect, reader: WeightReader, prefix: str, x: str
) -> str:
    bias = reader.tensor(f"{prefix}qkv.bias") if spec.qkv_bias else None
    weight = reader.tensor(f"{prefix}qkv.weight")
    query, key, value = dialect.split_linear(x, weight, bias, 3, "qkv")
    if spec.qk_normalization:
        # Over the full width, before the heads are split.
        eps = spec.layer_norm_eps
        query = dialect.rms_norm(query, reader.tensor(f"{prefix}q_norm.weight"), eps, "q_norm")
        key = dialect.rms_norm(key, reader.tensor(f"{prefix}k_norm.weight"), eps, "k_norm")
    shape = AttentionShape(spec.sequence_length, spec.num_attention_heads, spec.hidden_size)
    return dialect.full_attention((query, key, value), shape, "attend")


def _pixel_shuffle(spec: VisionSpec, graph: GraphBuilder, x: str) -> str:
    """Drop the class token, merge 2 x 2 patches into one token of four times the width."""
    g, half, width = spec.grid, spec.grid // SHUFFLE, spec.hidden_size
    with graph.scope("pixel_shuffle"):
        x = graph.node("Reshape", [x, graph.shape(-1, spec.sequence_length, width)], "tokens")
        start, end = graph.shape(1), graph.shape(1 + g * g)
        x = graph.node("Slice", [x, start, end, graph.shape(1)], "patches")
        # (n, g, g, C) -> (n, g/2, 2, g/2, 2, C) -> (n, g/2, g/2, 2, 2, C) -> (rows, 4C);
        # v1 lays the groups out column by column.
        x = graph.node("Reshape", [x, graph.shape(-1, half, SHUFFLE, half, SHUFFLE, width)], "grid")
        perm = [0, 1, 3, 2, 4, 5] if spec.ps_version == "v2" else [0, 3, 1, 2, 4, 5]
        x = graph.node("Transpose", [x], "groups", {"perm": perm})
        return graph.node("Reshape", [x, graph.shape(-1, spec.shuffled_size)], "output")


def _projector(spec: ModelSpec, dialect: Dialect, reader: WeightReader, x: str) -> str:
    with dialect.graph.scope("projector"):
        weight, bias = (reader.tensor(f"{PROJECTOR}norm.{leaf}") for leaf in ("weight", "bias"))
        x = dialect.layer_norm(x, weight, bias, PROJECTOR_EPS, "norm")
        up = _linear(reader, f"{PROJECTOR}fc1", "fc1")
        return dialect.gelu_mlp(x, up, _linear(reader, f"{PROJECTOR}fc2", "fc2"))


def _norm(
    spec: VisionSpec, dialect: Dialect, reader: WeightReader, prefix: str, x: str, name: str
) -> str:
    weight = reader.tensor(f"{prefix}.weight")
    if spec.norm_type == "rms_norm":
        return dialect.rms_norm(x, weight, spec.layer_norm_eps, name)
    bias = reader.tensor(f"{prefix}.bias")
    return dialect.layer_norm(x, weight, bias, spec.layer_norm_eps, name)


def _add_norm(
    spec: VisionSpec, dialect: Dialect, reader: WeightReader, prefix: str, terms: tuple[str, str]
) -> tuple[str, str]:
    """The sum of both terms, normed, and the sum itself."""
    if spec.norm_type == "rms_norm":
        weight = reader.tensor(f"{prefix}.weight")
        return dialect.add_rms_norm(*terms, weight, spec.layer_norm_eps, "norm")
    total = dialect.add(*terms, "residual")
    return _norm(spec, dialect, reader, prefix, total, "norm"), total


def _linear(reader: WeightReader, prefix: str, name: str, gain: Weight | None = None) -> Linear:
    return Linear(reader.tensor(f"{prefix}.weight"), reader.tensor(f"{prefix}.bias"), name, gain)


def _onnx_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
