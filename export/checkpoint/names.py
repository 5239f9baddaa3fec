"""Canonical names: what `export` and `bench` call a model's tensors, with their shapes.

The same for every decoder family and every layout. What a checkpoint calls them is said in
`families/` and `layouts`, what a bundle stores them as in `bundle.contract`.

A layer of the decoder has `attention_norm`, `qkv` (all query rows, all key rows, all value rows),
`out`, `ffn_norm`, `gate`, `up` and `down`: `down(silu(gate x) * up x)`; where heads are normed,
`q_norm` and `k_norm`. With experts it has `router`, `experts_gated` (of every expert the rows of
gate and up, in turns) and `experts_down` in the place of the last three.
"""

from __future__ import annotations

from typing import Literal

from internvl_edge.bundle.specs import LanguageSpec, ModelSpec, VisionSpec

Shapes = dict[str, tuple[int, ...]]
ModelPart = Literal["vision", "projector", "language"]

#: How the names of the tower's and the projector's tensors begin; all others are the decoder's.
VISION = "vision."
PROJECTOR = "projector."

#: In a layer with experts.
EXPERT_MATRICES = ("experts_gated", "experts_down")
EMBEDDING = "embedding.weight"
NORM = "norm.weight"
HEAD_PREFIX = "head."
HEAD = f"{HEAD_PREFIX}weight"


def decoder_prefix(layer: int) -> str:
    """Return how the names of one decoder layer's tensors begin."""
    return f"layers.{layer}."


def encoder_prefix(layer: int) -> str:
    """Return how the names of one encoder layer's tensors begin."""
    return f"{VISION}layers.{layer}."


def model_part(name: str) -> ModelPart:
    """Return the part of the model that a tensor belongs to."""
    if name.startswith(VISION):
        return "vision"
    return "projector" if name.startswith(PROJECTOR) else "language"


def is_language(name: str) -> bool:
    """Tell whether a tensor belongs to the decoder, its table and its head included."""
    return model_part(name) == "language"


def tensor_shapes(spec: ModelSpec) -> Shapes:
    """Return every tensor of a model and its shape; linear weights are `(out, in)`."""
    return {
        **_vision_shapes(spec.vision),
        **_projector_shapes(spec),
        **language_shapes(spec.language),
    }


def _vision_shapes(spec: VisionSpec) -> Shapes:
    width, mlp, patch = spec.hidden_size, spec.intermediate_size, spec.patch_size
    shapes: Shapes = {
        f"{VISION}class_embedding": (1, 1, width),
        f"{VISION}position_embedding": (1, 1 + spec.trained_grid**2, width),
        f"{VISION}patch_embedding.weight": (width, 3, patch, patch),
        f"{VISION}patch_embedding.bias": (width,),
    }
    layer: Shapes = {
        "qkv.weight": (3 * width, width),
        "proj.weight": (width, width),
        "proj.bias": (width,),
        "fc1.weight": (mlp, width),
        "fc1.bias": (mlp,),
        "fc2.weight": (width, mlp),
        "fc2.bias": (width,),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "ls1": (width,),
        "ls2": (width,),
    }
    if spec.qkv_bias:
        layer["qkv.bias"] = (3 * width,)
    if spec.qk_normalization:
        layer["q_norm.weight"] = layer["k_norm.weight"] = (width,)
    if spec.norm_type == "layer_norm":
        layer["norm1.bias"] = layer["norm2.bias"] = (width,)
    for i in range(spec.num_hidden_layers):
        shapes |= {f"{encoder_prefix(i)}{name}": shape for name, shape in layer.items()}
    return shapes


def _projector_shapes(spec: ModelSpec) -> Shapes:
    wide, hidden = spec.vision.shuffled_size, spec.language.hidden_size
    return {
        f"{PROJECTOR}norm.weight": (wide,),
        f"{PROJECTOR}norm.bias": (wide,),
        f"{PROJECTOR}fc1.weight": (hidden, wide),
        f"{PROJECTOR}fc1.bias": (hidden,),
        f"{PROJECTOR}fc2.weight": (hidden, hidden),
        f"{PROJECTOR}fc2.bias": (hidden,),
    }


def language_shapes(spec: LanguageSpec) -> Shapes:
    """Return every tensor of a decoder and its shape."""
    hidden = spec.hidden_size
    fused = spec.query_size + 2 * spec.key_value_size
    layer: Shapes = {
        "qkv.weight": (fused, hidden),
        "out.weight": (hidden, spec.query_size),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    if spec.qk_norm:
        layer["q_norm.weight"] = layer["k_norm.weight"] = (spec.head_dim,)
    if spec.has_qkv_bias:
        layer["qkv.bias"] = (fused,)
    if spec.bias:
        layer["out.bias"] = (hidden,)
    shapes: Shapes = {EMBEDDING: (spec.vocab_size, hidden)}
    for i in range(spec.num_hidden_layers):
        whole = layer | _mlp_shapes(spec, i)
        shapes |= {f"{decoder_prefix(i)}{name}": shape for name, shape in whole.items()}
    return shapes | {NORM: (hidden,), HEAD: (spec.vocab_size, hidden)}


def _mlp_shapes(spec: LanguageSpec, layer: int) -> Shapes:
    hidden, mlp, experts = spec.hidden_size, spec.mlp_size(layer), spec.experts
    if experts is None or not spec.has_experts(layer):
        return {
            "gate.weight": (mlp, hidden),
            "down.weight": (hidden, mlp),
            "up.weight": (mlp, hidden),
        }
    return {
        "router.weight": (experts, hidden),
        "experts_gated.weight": (experts * 2 * mlp, hidden),
        "experts_down.weight": (experts * hidden, mlp),
    }
