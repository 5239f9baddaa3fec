"""What a layout calls the tower's and the projector's tensors, and how it begins a decoder's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.names import encoder_prefix, is_language, tensor_shapes
from internvl_edge.export.checkpoint.origin import Origin, Table, joined, whole


@dataclass(frozen=True)
class Layout:
    """Names of one layout, in one generation of it.

    Attributes:
        vision: gives where the tower's and the projector's tensors lie, by canonical name.
        decoder: turns a decoder's own name into the stored one.
        mark: how a name of the tower begins in this generation.
        older: the generation before; None where there is none.
    """

    vision: Callable[[ModelSpec], Table]
    decoder: Callable[[str], str]
    mark: str
    older: Layout | None = None

    def holding(self, stored: Collection[str]) -> Layout:
        """Return the generation that these names are of; this one where none fits."""
        if self.older is None or any(name.startswith(self.mark) for name in stored):
            return self
        return self.older


def _table(
    spec: ModelSpec, outside: Mapping[str, str], layer: str, inside: Mapping[str, str]
) -> Table:
    """Return whole tensors by canonical name.

    Args:
        outside: stored names of modules outside of the layers, by canonical name.
        layer: how names of a layer's begin, `{}` being its number.
        inside: stored names of modules within a layer.
    """
    names = dict(outside)
    for number in range(spec.vision.num_hidden_layers):
        here, there = encoder_prefix(number), layer.format(number)
        names |= {here + ours: there + theirs for ours, theirs in inside.items()}
    return {
        name: whole(_renamed(name, names)) for name in tensor_shapes(spec) if not is_language(name)
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a tensor's name with its module's replaced; its leaf is `weight`, `bias` or none."""
    if name in names:
        return names[name]
    module, _, leaf = name.rpartition(".")
    return f"{names[module]}.{leaf}"


def _original_vision(spec: ModelSpec) -> Table:
    tower = "vision_model."
    outside = {
        "vision.class_embedding": f"{tower}embeddings.class_embedding",
        "vision.position_embedding": f"{tower}embeddings.position_embedding",
        "vision.patch_embedding": f"{tower}embeddings.patch_embedding",
        "projector.norm": "mlp1.0",
        "projector.fc1": "mlp1.1",
        "projector.fc2": "mlp1.3",
    }
    same = {name: name for name in ("norm1", "norm2", "ls1", "ls2")}
    attention = {name: f"attn.{name}" for name in ("qkv", "q_norm", "k_norm", "proj")}
    mlp = {name: f"mlp.{name}" for name in ("fc1", "fc2")}
    return _table(spec, outside, f"{tower}encoder.layers.{{}}.", same | attention | mlp)


def _native_vision(spec: ModelSpec, prefix: str) -> Table:
    """Return the tower's table in transformers' own layout: query, key and value are apart."""
    tower, projector = f"{prefix}vision_tower.", f"{prefix}multi_modal_projector."
    outside = {
        "vision.class_embedding": f"{tower}embeddings.cls_token",
        "vision.position_embedding": f"{tower}embeddings.position_embeddings",
        "vision.patch_embedding": f"{tower}embeddings.patch_embeddings.projection",
        "projector.norm": f"{projector}layer_norm",
        "projector.fc1": f"{projector}linear_1",
        "projector.fc2": f"{projector}linear_2",
    }
    inside = {
        "qkv": "attention.qkv",
        "q_norm": "attention.q_norm",
        "k_norm": "attention.k_norm",
        "proj": "attention.projection_layer",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
    }
    table = _table(spec, outside, f"{tower}encoder.layer.{{}}.", inside)
    return {name: _apart(origin, spec.vision.hidden_size) for name, origin in table.items()}


def _apart(origin: Origin, rows: int) -> Origin:
    """Return query, key and value joined in the place of a fused tensor; another as it is."""
    (name,) = origin.names
    before, fused, leaf = name.partition(".attention.qkv.")
    if not fused:
        return origin
    return joined({f"{before}.attention.{part}_proj.{leaf}": rows for part in "qkv"})


def _native_decoder(name: str) -> str:
    inner = "model."
    return f"model.language_model.{name[len(inner) :]}" if name.startswith(inner) else name


def _after_language_model(name: str) -> str:
    return f"language_model.{name}"


#: `internvl_chat`, as the models were released first.
ORIGINAL = Layout(_original_vision, _after_language_model, "vision_model.")
#: `internvl`: transformers' own; before 4.53 saved with the prefixes that its classes had then.
NATIVE = Layout(
    partial(_native_vision, prefix="model."),
    _native_decoder,
    "model.vision_tower.",
    older=Layout(partial(_native_vision, prefix=""), _after_language_model, "vision_tower."),
)
