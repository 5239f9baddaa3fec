"""Frozen descriptions of a model: everything a graph or a loop needs to know, derived once.

`export` fills these from a checkpoint's config.json and writes them into bundle.json; the runtime
reads them back. Field names are the checkpoint's own where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.spec_fields import MAX_INTEGER, read_part, written

NormType = Literal["rms_norm", "layer_norm"]
PixelShuffleVersion = Literal["v1", "v2"]
Resize = Literal["pillow", "torchvision"]
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
#: Kinds whose inverse frequencies are stored, and those that stretch the trained length.
STORED_FREQUENCIES = ("llama3", "yarn", "longrope")
STRETCHING = ("linear", "dynamic")

#: More layers than any known tower or decoder has.
MAX_LAYERS = 1024
#: More experts than any known decoder's layer has.
MAX_EXPERTS = 4096
#: Longest side of a tile: at 14-pixel patches one head's attention scores take 1.8 GB there.
MAX_TILE_SIZE = 2048
#: Most tiles of one image; more would not fit the context of any model of the family.
MAX_TILES = 1024
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
    """A LLaMA-like decoder with grouped-query attention.

    Attributes:
        bias: whether query, key, value and output projections have one.
        qkv_bias: whether query, key and value have one and the output has none.
        head_size: of one head; None where it is `hidden_size / num_attention_heads`.
        qk_norm: whether each head of queries and keys is normed before it is rotated.
        tied_head: whether the checkpoint has one matrix as table and as head.
        experts: how many MLPs of `intermediate_size` a layer has; None where it has one, for all
            tokens.
        experts_per_token: how many of them a token goes through.
        experts_normed: whether their shares add up to one.
        dense_layers: layers with one MLP all the same, counted from 1.
        dense_size: the width of that MLP.
        rope_frequencies: inverse frequencies `(head_dim / 2,)`; empty where theta gives them.
        rope_long_frequencies: those of sequences beyond `rope_original` tokens; empty: the same.
        rope_original: see there; None where there is one set.
        rope_attention: what cosines and sines are multiplied by.
    """

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
    qkv_bias: bool = False
    head_size: int | None = None
    qk_norm: bool = False
    tied_head: bool = False
    experts: int | None = None
    experts_per_token: int | None = None
    experts_normed: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_size: int | None = None
    rope_frequencies: tuple[float, ...] = ()
    rope_long_frequencies: tuple[float, ...] = ()
    rope_original: int | None = None
    rope_attention: float = 1.0

    def has_experts(self, layer: int) -> bool:
        """Tell whether a layer, counted from 0, has experts."""
        return self.experts is not None and layer + 1 not in self.dense_layers

    def mlp_size(self, layer: int) -> int:
        """Return the width of a layer's MLP, or of each of its experts."""
        dense = layer + 1 in self.dense_layers
        return self.dense_size or self.intermediate_size if dense else self.intermediate_size

    @property
    def expert_weights(self) -> int:
        """Weights of the experts of all layers."""
        widths = (self.mlp_size(i) for i in range(self.num_hidden_layers) if self.has_experts(i))
        return 3 * self.hidden_size * (self.experts or 0) * sum(widths)

    @property
    def linear_weights(self) -> int:
        """Weights of the matrices of all layers."""
        attention = 2 * (self.query_size + self.key_value_size)
        layers = range(self.num_hidden_layers)
        widths = [attention + (0 if self.has_experts(i) else 3 * self.mlp_size(i)) for i in layers]
        return self.hidden_size * sum(widths) + self.expert_weights

    @property
    def token_weights(self) -> int:
        """Those of them that one token goes through."""
        if self.experts is None:
            return self.linear_weights
        left_out = self.experts - (self.experts_per_token or 0)
        return self.linear_weights - self.expert_weights * left_out // self.experts

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have a bias."""
        return self.bias or self.qkv_bias

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def max_context(self) -> int:
        """Longest sequence offered: dynamic and linear scaling stretch the trained length."""
        if self.rope_type not in STRETCHING:
            return self.max_position_embeddings
        return int(self.max_position_embeddings * self.rope_factor)


@dataclass(frozen=True)
class TilingSpec:
    """The cutting of an image where the caller does not say.

    Attributes:
        resize: whose pixels a picture is resized to: the two round weights otherwise.
    """

    dynamic: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    resize: Resize = "pillow"


@dataclass(frozen=True)
class PromptSpec:
    """Template name and, where the checkpoint overrides it, the system message.

    Attributes:
        stop_ids: tokens that end an answer besides the template's.
    """

    template: str
    system_message: str | None
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationSpec:
    """How answers are made where the caller does not say; greedy unless the checkpoint samples.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: as of the runtime's `Sampling`.
        max_new_tokens: an answer ends there; None where the checkpoint does not say.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A whole InternVL model."""

    vision: VisionSpec
    language: LanguageSpec
    tiling: TilingSpec
    prompt: PromptSpec
    generation: GenerationSpec = GenerationSpec()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a part or field that has its default is left out."""
        return {name: written(part) for name, part in written(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`.

        Raises:
            BundleError: a field is missing, unknown or of another type, or does not go with others.
        """
        spec = cls(
            vision=read_part(VisionSpec, data, "vision"),
            language=read_part(LanguageSpec, data, "language"),
            tiling=read_part(TilingSpec, data, "tiling"),
            prompt=read_part(PromptSpec, data, "prompt"),
            generation=read_part(GenerationSpec, {"generation": {}, **data}, "generation"),
        )
        if (problem := inconsistency(spec)) is not None:
            raise BundleError(f"bundle.json: {problem}; export the checkpoint again")
        return spec


def inconsistency(spec: ModelSpec) -> str | None:
    """Return what contradicts itself in a model, or is beyond what is supported; None: nothing.

    Fields are called as in `ModelSpec`, with the checkpoint's name in brackets where it differs.
    """
    return next(_inconsistencies(spec), None)


def _inconsistencies(spec: ModelSpec) -> Iterator[str]:
    """One after the other: later ones are computed from what earlier ones let pass."""
    yield from _of_vision(spec.vision)
    yield from _of_language(spec.language)
    yield from _of_tiling(spec.tiling)
    for name in ("top_p", "min_p"):
        if (got := getattr(spec.generation, name)) > 1:
            yield f"generation.{name} is {got:.6g}, expected at most 1"
    stops, vocab = spec.prompt.stop_ids, spec.language.vocab_size
    if stops and not 0 <= min(stops) <= max(stops) < vocab:
        yield f"prompt.stop_ids (eos_token_id) must be in 0..{vocab - 1}, got {quoted(stops)}"
    rows, context = spec.vision.tokens_per_tile, spec.language.max_context
    if rows > context:
        yield f"one tile takes {rows} positions of the decoder, the context has {context}"


def _of_vision(vision: VisionSpec) -> Iterator[str]:
    yield from _indivisible("vision.hidden_size", vision.hidden_size, vision.num_attention_heads)
    yield from _too_large("vision.num_hidden_layers", vision.num_hidden_layers, MAX_LAYERS)
    side = "vision.tile_size (force_image_size)"
    yield from _too_large(side, vision.tile_size, MAX_TILE_SIZE)
    yield from _too_large("vision.image_size", vision.image_size, MAX_TILE_SIZE)
    yield from _indivisible(side, vision.tile_size, vision.patch_size * SHUFFLE)
    if vision.image_size < vision.patch_size:
        yield f"vision: image_size {vision.image_size} < patch_size {vision.patch_size}"
    if not 0 <= vision.layers_run <= vision.num_hidden_layers:
        yield (
            f"vision.select_layer is {vision.select_layer}, the tower has"
            f" {vision.num_hidden_layers} layers"
        )


def _of_language(language: LanguageSpec) -> Iterator[str]:
    heads = language.num_attention_heads
    if language.head_size is None:
        yield from _indivisible("language.hidden_size", language.hidden_size, heads)
    yield from _indivisible("language.num_attention_heads", heads, language.num_key_value_heads)
    yield from _indivisible("the size of a language head", language.head_dim, 2)
    yield from _too_large("language.num_hidden_layers", language.num_hidden_layers, MAX_LAYERS)
    factor = language.rope_factor
    if factor < 1 or (language.rope_type == "default" and factor != 1):
        expected = "1" if language.rope_type == "default" else "1 or more"
        yield (
            f"the rotary embedding's factor is {factor:.6g}, expected {expected} with the type"
            f" {language.rope_type}"
        )
    yield from _of_frequencies(language)
    if language.experts is not None or language.experts_per_token is not None:
        experts, chosen = language.experts or 0, language.experts_per_token or 0
        yield from _too_large("language.experts (num_experts)", experts, MAX_EXPERTS)
        if not 1 <= chosen <= experts:
            yield f"a token goes through {chosen} experts, expected 1 to {experts}"
    if bool(language.dense_layers) != (language.dense_size is not None):
        yield "language.dense_layers and language.dense_size go together"
    if language.dense_layers and max(language.dense_layers) > language.num_hidden_layers:
        yield f"language.dense_layers names a layer beyond {language.num_hidden_layers}"
    if (longest := language.max_position_embeddings * factor) > MAX_INTEGER:
        yield f"the context is {longest:.6g} tokens, the longest context supported {MAX_INTEGER}"


def _of_frequencies(language: LanguageSpec) -> Iterator[str]:
    lanes, kind = language.head_dim // 2, language.rope_type
    expected = lanes if kind in STORED_FREQUENCIES else 0
    beyond = lanes if kind == "longrope" else 0
    for name, got, wanted in (
        ("frequencies", language.rope_frequencies, expected),
        ("frequencies of long sequences", language.rope_long_frequencies, beyond),
    ):
        if len(got) != wanted:
            yield (
                f"the rotary embedding has {len(got)} {name}, expected {wanted} with the type"
                f" {kind} and heads of {language.head_dim}"
            )
    if (kind == "longrope") != (language.rope_original is not None):
        yield f"language.rope_original does not go with the rotary embedding's type {kind}"


def _of_tiling(tiling: TilingSpec) -> Iterator[str]:
    most = "tiling.max_tiles (max_dynamic_patch)"
    yield from _too_large(most, tiling.max_tiles, MAX_TILES)
    if tiling.min_tiles > tiling.max_tiles:
        yield (
            f"tiling.min_tiles (min_dynamic_patch) is {tiling.min_tiles}, expected at most"
            f" {tiling.max_tiles}, which is {most}"
        )


def _indivisible(name: str, value: int, divisor: int) -> Iterator[str]:
    if value % divisor:
        yield f"{name} {value} is not a multiple of {divisor}"


def _too_large(name: str, value: int, limit: int) -> Iterator[str]:
    if value > limit:
        yield f"{name} is {value}, at most {limit} is supported"
