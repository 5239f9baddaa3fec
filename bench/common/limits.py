"""Each measured phase beside the least time this machine could take for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.bench.common.ceilings import Ceilings
from internvl_edge.bench.common.roofline import (
    Ceiling,
    Work,
    cache_token_bytes,
    language_work,
    vision_work,
)
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.sizes import bundle_bytes


@dataclass(frozen=True)
class Limit:
    """The bound of a phase in seconds, and whether arithmetic or memory sets it."""

    seconds: float
    by: str


@dataclass(frozen=True)
class Weights:
    """A bundle's part of a roofline: the model, its bytes by part, its precisions."""

    spec: ModelSpec
    parts: Mapping[str, int]
    vision: str
    language: str
    kv: str

    @classmethod
    def of(cls, manifest: Manifest) -> Weights:
        """Read a bundle's; without recorded parts they are computed at block 128."""
        parts = {name: entry.bytes for name, entry in manifest.parts.items()}
        recipe = Recipe(manifest.vision, manifest.language, manifest.kv, QuantOptions())
        return cls(
            manifest.spec,
            parts or bundle_bytes(manifest.spec, recipe),
            manifest.vision,
            manifest.language,
            manifest.kv,
        )

    @classmethod
    def from_dict(cls, model: Mapping[str, Any]) -> Weights:
        """Read those of one model in a stored result."""
        precision = model["precision"]
        return cls(
            ModelSpec.from_dict(model["spec"]),
            model["parts"],
            precision["vision"],
            precision["language"],
            precision["kv"],
        )

    def vision_pass(self, tiles: int) -> Work:
        return vision_work(self.spec, tiles, self.parts)

    def language_pass(self, tokens: int, cached: int) -> Work:
        """A pass that ends in the logits of its last row."""
        language = self.spec.language
        kv_bytes = cache_token_bytes(language, self.kv)
        return language_work(language, tokens, cached, 1, self.parts, kv_bytes)


def phase_limits(
    weights: Weights, ceilings: Ceilings, *, tiles: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Limit]:
    """Bounds of the phases that have one.

    A token of the answer is bounded at the context's mean length; the first token needs the
    pictures and the prompt, and nothing of either can overlap.
    """
    vision_ceiling = ceilings.ceiling(weights.vision)
    language_ceiling = ceilings.ceiling(weights.language)
    limits = {
        "prefill": _limit(language_ceiling, weights.language_pass(prompt_tokens, 0)),
        "itl": _limit(language_ceiling, weights.language_pass(1, prompt_tokens + new_tokens // 2)),
    }
    first = limits["prefill"].seconds
    if tiles:
        limits["vision"] = _limit(vision_ceiling, weights.vision_pass(tiles))
        first += limits["vision"].seconds
    return limits | {"ttft": Limit(first, "both")}


def _limit(ceiling: Ceiling, work: Work) -> Limit:
    seconds = ceiling.seconds(work)
    memory = work.read_bytes / ceiling.bandwidth
    return Limit(seconds, "memory" if seconds == memory else "arithmetic")
