"""What a phase must compute and read, counted from the spec; and the time that takes at best.

A multiply and an add are two operations. Counted are the linear layers and the two products of
attention, as in the usual model-cost tables: norms, activations, softmax and rotation are below
1 % of either model's work. Causal attention counts the keys a row may see.

    bound = max(operations / rate, bytes / bandwidth)        (Williams et al. 2009, the roofline)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from internvl_edge.bundle.specs import LanguageSpec, ModelSpec
from internvl_edge.runtime.inspection import ITEM_BYTES


@dataclass(frozen=True)
class Work:
    """Operations of linear layers and of attention, and the bytes that must be read once."""

    linear: float
    attention: float
    read_bytes: float

    @property
    def operations(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class Ceiling:
    """A machine's rates: operations a second (linear, attention), bytes read a second."""

    linear: float
    attention: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """The least time `work` can take."""
        compute = work.linear / self.linear + work.attention / self.attention
        return max(compute, work.read_bytes / self.bandwidth)


def vision_work(spec: ModelSpec, tiles: int, parts: Mapping[str, int]) -> Work:
    """Tower and projector over `tiles` in one pass.

    Args:
        parts: bytes of the weights by part; see `export.sizes.bundle_bytes`.
    """
    vision = spec.vision
    tokens, width, mlp = vision.sequence_length, vision.hidden_size, vision.intermediate_size
    patch = vision.grid**2 * 3 * vision.patch_size**2 * width
    layer = tokens * (4 * width**2 + 2 * width * mlp)
    hidden = spec.language.hidden_size
    projector = vision.tokens_per_tile * (vision.shuffled_size * hidden + hidden**2)
    # Two products of (tokens x width) by (width x tokens), whatever the number of heads.
    attention = vision.layers_run * 2 * tokens**2 * width
    return Work(
        linear=2.0 * tiles * (patch + vision.layers_run * layer + projector),
        attention=2.0 * tiles * attention,
        read_bytes=float(parts["vision_linears"] + parts["projector"]),
    )


def language_work(
    spec: LanguageSpec,
    tokens: int,
    cached: int,
    logit_rows: int,
    parts: Mapping[str, int],
    cache_token_bytes: float,
) -> Work:
    """One pass of the decoder over `tokens` new rows behind `cached` ones.

    Decoding is `tokens=1, logit_rows=1`; a whole prefill `cached=0, logit_rows=1`.

    Args:
        parts: bytes of the weights by part.
        cache_token_bytes: of one position's keys and values in all layers.
    """
    head = logit_rows * spec.hidden_size * spec.vocab_size
    # Of experts those of one token at least; more rows may need more.
    decoder = parts["decoder_linears"] * spec.token_weights / spec.linear_weights
    # Row i of the new ones sees cached + i + 1 keys.
    keys = tokens * cached + tokens * (tokens + 1) / 2
    return Work(
        linear=2.0 * (tokens * spec.token_weights + head),
        attention=4.0 * spec.num_hidden_layers * spec.query_size * keys,
        read_bytes=decoder + parts["head"] + cache_token_bytes * cached,
    )


def cache_token_bytes(spec: LanguageSpec, precision: str) -> int:
    """Bytes of one position's keys and values in all layers."""
    sizes: Mapping[str, int] = {str(name): size for name, size in ITEM_BYTES.items()}
    return 2 * spec.num_hidden_layers * spec.key_value_size * sizes[precision]
