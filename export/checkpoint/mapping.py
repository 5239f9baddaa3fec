"""Which tensors a checkpoint must hold, by name and shape: pure and total.

Names are the checkpoint's own (InternVL-Chat-V1-5 layout). A tensor missing, or one that nothing
would use, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.quoting import named, quoted
from internvl_edge.bundle.specs import LanguageSpec, ModelSpec, VisionSpec

Shapes = dict[str, tuple[int, ...]]

VISION = "vision_model"
PROJECTOR = "mlp1"
LANGUAGE = "language_model"
TOK_EMBEDDINGS = f"{LANGUAGE}.model.tok_embeddings.weight"


def expected_shapes(spec: ModelSpec) -> Shapes:
    """Every tensor of a checkpoint with this config. Linear weights are `(out, in)`."""
    return {
        **_vision_shapes(spec.vision),
        **_projector_shapes(spec),
        **_language_shapes(spec.language),
    }


def check_names(names: Iterable[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the names are exactly the expected ones."""
    found = set(names)
    lora = sorted(name for name in found if "lora_" in name or name.startswith("base_model."))
    if lora:
        raise CheckpointError(
            f"the checkpoint holds unmerged LoRA tensors ({named(lora[0])}); merge them into the"
            " model"
        )
    if missing := sorted(expected.keys() - found):
        raise CheckpointError(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unmapped := sorted(found - expected.keys()):
        raise CheckpointError(
            f"{len(unmapped)} tensors are not part of the architecture in config.json:"
            f" {_some(unmapped)}"
        )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless every tensor has the shape config.json implies."""
    wrong = [
        f"{name} is {quoted(list(shapes[name]))}, config.json implies {list(shape)}"
        for name, shape in sorted(expected.items())
        if shapes[name] != shape
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors have the wrong shape: {wrong[0]}")


def _vision_shapes(spec: VisionSpec) -> Shapes:
    width, mlp, patch = spec.hidden_size, spec.intermediate_size, spec.patch_size
    embeddings = f"{VISION}.embeddings"
    shapes: Shapes = {
        f"{embeddings}.class_embedding": (1, 1, width),
        f"{embeddings}.position_embedding": (1, 1 + spec.trained_grid**2, width),
        f"{embeddings}.patch_embedding.weight": (width, 3, patch, patch),
        f"{embeddings}.patch_embedding.bias": (width,),
    }
    layer: Shapes = {
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (mlp, width),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (width, mlp),
        "mlp.fc2.bias": (width,),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "ls1": (width,),
        "ls2": (width,),
    }
    if spec.qkv_bias:
        layer["attn.qkv.bias"] = (3 * width,)
    if spec.qk_normalization:
        layer["attn.q_norm.weight"] = layer["attn.k_norm.weight"] = (width,)
    if spec.norm_type == "layer_norm":
        layer["norm1.bias"] = layer["norm2.bias"] = (width,)
    return shapes | _repeat(f"{VISION}.encoder.layers", spec.num_hidden_layers, layer)


def _projector_shapes(spec: ModelSpec) -> Shapes:
    wide, hidden = spec.vision.shuffled_size, spec.language.hidden_size
    return {
        f"{PROJECTOR}.0.weight": (wide,),
        f"{PROJECTOR}.0.bias": (wide,),
        f"{PROJECTOR}.1.weight": (hidden, wide),
        f"{PROJECTOR}.1.bias": (hidden,),
        f"{PROJECTOR}.3.weight": (hidden, hidden),
        f"{PROJECTOR}.3.bias": (hidden,),
    }


def _language_shapes(spec: LanguageSpec) -> Shapes:
    hidden, mlp = spec.hidden_size, spec.intermediate_size
    fused = spec.query_size + 2 * spec.key_value_size
    layer: Shapes = {
        "attention.wqkv.weight": (fused, hidden),
        "attention.wo.weight": (hidden, spec.query_size),
        "attention_norm.weight": (hidden,),
        "feed_forward.w1.weight": (mlp, hidden),
        "feed_forward.w2.weight": (hidden, mlp),
        "feed_forward.w3.weight": (mlp, hidden),
        "ffn_norm.weight": (hidden,),
    }
    if spec.bias:
        layer |= {"attention.wqkv.bias": (fused,), "attention.wo.bias": (hidden,)}
    return {
        TOK_EMBEDDINGS: (spec.vocab_size, hidden),
        **_repeat(f"{LANGUAGE}.model.layers", spec.num_hidden_layers, layer),
        f"{LANGUAGE}.model.norm.weight": (hidden,),
        f"{LANGUAGE}.output.weight": (spec.vocab_size, hidden),
    }


def _repeat(prefix: str, count: int, layer: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}


def _some(names: list[str]) -> str:
    return ", ".join(map(named, names[:5])) + (", ..." if len(names) > 5 else "")
