"""What a layout calls the tower's and the projector's tensors: the same for every decoder."""

from __future__ import annotations

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.names import encoder_prefix, is_language, tensor_shapes
from internvl_edge.export.checkpoint.origin import Table, whole

#: Of the original layout (`internvl_chat`): what stands before a decoder's own names.
ORIGINAL_DECODER = "language_model."

_OUTSIDE = {
    "vision.class_embedding": "vision_model.embeddings.class_embedding",
    "vision.position_embedding": "vision_model.embeddings.position_embedding",
    "vision.patch_embedding": "vision_model.embeddings.patch_embedding",
    "projector.norm": "mlp1.0",
    "projector.fc1": "mlp1.1",
    "projector.fc2": "mlp1.3",
}
_LAYER = {
    "qkv": "attn.qkv",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1": "ls1",
    "ls2": "ls2",
}


def original_vision(spec: ModelSpec) -> Table:
    """Return where the original layout keeps the tower and the projector."""
    names = dict(_OUTSIDE)
    for layer in range(spec.vision.num_hidden_layers):
        there = f"vision_model.encoder.layers.{layer}."
        names |= {encoder_prefix(layer) + ours: there + theirs for ours, theirs in _LAYER.items()}
    return {
        name: whole(_renamed(name, names)) for name in tensor_shapes(spec) if not is_language(name)
    }


def _renamed(name: str, names: dict[str, str]) -> str:
    """Return a tensor's name with its module's replaced; its leaf is `weight`, `bias` or none."""
    if name in names:
        return names[name]
    module, _, leaf = name.rpartition(".")
    return f"{names[module]}.{leaf}"
