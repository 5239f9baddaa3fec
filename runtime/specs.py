"""Frozen descriptions of a model: everything a graph or a loop needs to know, derived once.

`export` fills these from a checkpoint's config.json and writes them into bundle.json; the runtime
reads them back. Field names are the checkpoint's own where it has one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from internvl_edge.runtime.errors import BundleError

NormType = Literal["rms_norm", "layer_norm"]
PixelShuffleVersion = Literal["v1", "v2"]
RopeType = Literal["default", "linear", "dynamic"]

_Spec = TypeVar("_Spec")

#: Largest size or position: they are int32 in the graphs' contract.
MAX_INTEGER = 2**31 - 1
#: Side of the square of patches that pixel shuffle merges into one token (downsample_ratio 0.5).
SHUFFLE = 2
#: The projector's LayerNorm is built with PyTorch's default epsilon, whatever the tower uses.
PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class VisionSpec:
    """InternViT with pixel shuffle: tiles in, `tokens_per_tile` rows of `shuffled_size` out."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int  # side the stored position table was trained at
    tile_size: int  # side of the tiles fed to the tower
    patch_size: int
    norm_type: NormType
    layer_norm_eps: float
    qk_normalization: bool
    qkv_bias: bool
    select_layer: int
    ps_version: PixelShuffleVersion

    @property
    def grid(self) -> int:
        """Patches along one side of a tile: 448 / 14 = 32."""
        return self.tile_size // self.patch_size

    @property
    def trained_grid(self) -> int:
        """Patches along one side of the stored position table."""
        return self.image_size // self.patch_size

    @property
    def sequence_length(self) -> int:
        """Class token and patches: 1 + 32 * 32 = 1025."""
        return 1 + self.grid**2

    @property
    def tokens_per_tile(self) -> int:
        """Rows a tile takes in the language model: (32 / 2) ** 2 = 256."""
        return (self.grid // SHUFFLE) ** 2

    @property
    def shuffled_size(self) -> int:
        """Width of a token after pixel shuffle: 4 * 3200 = 12800."""
        return SHUFFLE**2 * self.hidden_size

    @property
    def layers_run(self) -> int:
        """Layers needed for `select_layer`: entry k of [embeddings, layer 1, ..., layer L]."""
        if self.select_layer >= 0:
            return self.select_layer
        return self.num_hidden_layers + 1 + self.select_layer


@dataclass(frozen=True)
class LanguageSpec:
    """InternLM2: a LLaMA-like decoder with grouped-query attention."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    bias: bool
    max_position_embeddings: int
    rope_theta: float
    rope_type: RopeType
    rope_factor: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def max_context(self) -> int:
        """Longest sequence offered: dynamic and linear scaling stretch the trained length."""
        if self.rope_type == "default":
            return self.max_position_embeddings
        return int(self.max_position_embeddings * self.rope_factor)


@dataclass(frozen=True)
class TilingSpec:
    """How an image is cut when the caller does not say."""

    dynamic: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool


@dataclass(frozen=True)
class PromptSpec:
    """Template name and, where the checkpoint overrides it, the system message."""

    template: str
    system_message: str | None


@dataclass(frozen=True)
class ModelSpec:
    """A whole InternVL model."""

    vision: VisionSpec
    language: LanguageSpec
    tiling: TilingSpec
    prompt: PromptSpec

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`.

        Raises:
            BundleError: a field is missing, unknown or of another type.
        """
        spec = cls(
            vision=_read(VisionSpec, data, "vision"),
            language=_read(LanguageSpec, data, "language"),
            tiling=_read(TilingSpec, data, "tiling"),
            prompt=_read(PromptSpec, data, "prompt"),
        )
        longest = spec.language.max_position_embeddings * spec.language.rope_factor
        if not 1 <= longest <= MAX_INTEGER:
            raise BundleError(
                f"bundle.json: the context is {longest:.6g} tokens, expected 1..{MAX_INTEGER}"
            )
        return spec


_EXPECTED: dict[Any, str] = {
    int: "a positive integer",
    float: "a positive number",
    bool: "true or false",
    str: "text",
}


def _read(kind: type[_Spec], data: Mapping[str, Any], part: str) -> _Spec:
    values = data.get(part)
    if not isinstance(values, Mapping):
        raise BundleError(f"bundle.json: spec has no object '{part}'")
    hints = get_type_hints(kind)
    if values.keys() != hints.keys():
        odd = sorted(values.keys() ^ hints.keys())
        raise BundleError(f"bundle.json: spec.{part} has missing or unknown fields: {odd}")
    for name, hint in hints.items():
        if not _fits(values[name], hint, signed=name == "select_layer"):
            expected = _EXPECTED.get(hint, hint)
            raise BundleError(
                f"bundle.json: spec.{part}.{name} is {values[name]!r}, expected {expected}"
            )
    return kind(**values)


def _fits(value: object, hint: Any, *, signed: bool) -> bool:
    if hint in (int, float):
        kinds = (int, float) if hint is float else int
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        return signed or 0 < value <= (MAX_INTEGER if hint is int else sys.float_info.max)
    if hint in (bool, str):
        return isinstance(value, hint)
    options = get_args(hint)  # Literal[...] or str | None
    return value in options or (str in options and (value is None or isinstance(value, str)))
