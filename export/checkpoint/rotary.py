"""The rotary embedding in a decoder's config: under any spelling, to inverse frequencies.

Formulas: llama3 (Llama 3.1), yarn (Peng et al. 2023, arXiv:2309.00071), longrope (Ding et al. 2024,
arXiv:2402.13753), as transformers computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.specs import RopeType
from internvl_edge.export.checkpoint.section import REQUIRED, Section

Floats = NDArray[np.float64]

#: Phi-3's first name of longrope.
_OLD_NAMES = {"su": "longrope"}
_KINDS = (*get_args(RopeType), *_OLD_NAMES)


@dataclass(frozen=True)
class Rope:
    """A rotary embedding as it is told.

    Attributes:
        theta: None where it is not told.
        original: the length the kind's own scaling begins at; 0 where it has none.
        attention: what cosines and sines are multiplied by.
        bounds: llama3's factors of low and high frequencies, yarn's slow and fast rotations.
        truncate: whether yarn rounds the lanes its bounds fall on.
        short, long: longrope's divisors, one for each pair of lanes.
    """

    kind: RopeType
    factor: float
    theta: float | None
    original: int = 0
    attention: float = 1.0
    bounds: tuple[float, float] = (0.0, 0.0)
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def check_lanes(self, llm: Section, head_dim: int) -> None:
        """Raise CheckpointError unless longrope has a divisor for each pair of a head's lanes."""
        for key, values in (("short_factor", self.short), ("long_factor", self.long)):
            if self.kind == "longrope" and len(values) != head_dim // 2:
                told = "rope_scaling" if llm.raw("rope_scaling", None) else "rope_parameters"
                raise llm.bad(f"{told}.{key}", values, f"a list of {head_dim // 2} numbers")

    def frequencies(self, theta: float, head_dim: int) -> tuple[Floats, Floats]:
        """Return inverse frequencies `(head_dim / 2,)`, and those of long sequences.

        Both are empty where they follow from theta, the second where there is one set for all.
        """
        plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        none = np.empty(0)
        if self.kind == "llama3":
            return self._llama3(plain), none
        if self.kind == "yarn":
            return self._yarn(plain, theta, head_dim), none
        if self.kind == "longrope":
            return plain / np.array(self.short), plain / np.array(self.long)
        return none, none

    def _llama3(self, plain: Floats) -> Floats:
        """Short waves stay, long ones are stretched, those between are mixed."""
        low, high = self.bounds
        waves = 2 * np.pi / plain
        share = np.clip((self.original / waves - low) / (high - low), 0, 1)
        return np.asarray(plain * (share + (1 - share) / self.factor))

    def _yarn(self, plain: Floats, theta: float, head_dim: int) -> Floats:
        """Lanes that turn often within the trained length stay, those that turn seldom stretch."""

        def lane(turns: float) -> float:
            waves = self.original / (2 * math.pi * turns)
            return head_dim * math.log(waves) / (2 * math.log(theta))

        slow, fast = self.bounds
        first, last = lane(fast), lane(slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001
        share = np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)
        return np.asarray(plain * (1 - share) + plain / self.factor * share)


def read_rope(llm: Section) -> Rope:
    """Read `rope_scaling` (transformers 4) and `rope_parameters` (5), and theta beside them.

    Raises:
        CheckpointError: a kind is unknown, a value malformed, or two places contradict each other.
    """
    told = {
        key: _section(llm.section(key), llm, default)
        for key, default in (("rope_scaling", REQUIRED), ("rope_parameters", "default"))
        if llm.raw(key, None) not in (None, {})
    }
    first, *others = told.values() or (Rope("default", 1.0, None),)
    for other in others:
        if replace(other, theta=None) != replace(first, theta=None):
            raise CheckpointError(
                f"config.json: '{llm.name('rope_scaling')}' is {first.kind} by {first.factor:.6g},"
                f" '{llm.name('rope_parameters')}' is {other.kind} by {other.factor:.6g}; remove"
                " the one that is not meant"
            )
    beside = None if llm.raw("rope_theta", None) is None else llm.number("rope_theta")
    thetas = {llm.name("rope_theta"): beside}
    thetas |= {llm.name(f"{key}.rope_theta"): rope.theta for key, rope in told.items()}
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        both = ", ".join(f"'{name}' is {theta:.12g}" for name, theta in given.items())
        raise CheckpointError(f"config.json: {both}; remove the one that is not meant")
    return replace(first, theta=next(iter(given.values()), None))


def _section(rope: Section, llm: Section, default: object) -> Rope:
    """Read one object that describes the rotary embedding, under any of its keys' spellings."""
    spelt = [key for key in ("rope_type", "type") if rope.raw(key, None) is not None]
    told = [rope.one_of(key, _KINDS) for key in spelt] or [rope.one_of("type", _KINDS, default)]
    kinds: list[RopeType] = [_OLD_NAMES.get(kind, kind) for kind in told]
    if len(set(kinds)) > 1:
        raise rope.bad("type", told[-1], f"the same as 'rope_type', {told[0]}")
    theta = None if rope.raw("rope_theta", None) is None else rope.number("rope_theta")
    rope.only("partial_rotary_factor", 1.0)
    if kinds[0] == "longrope":
        found = _longrope(rope, llm)
    elif kinds[0] in ("llama3", "yarn"):
        found = _bounded(rope, kinds[0])
    else:
        found = Rope(kinds[0], _factor(rope, kinds[0]), None)
        rope.only("original_max_position_embeddings", llm.raw("max_position_embeddings", None))
    rope.finish(())
    return replace(found, theta=theta)


def _factor(rope: Section, kind: RopeType) -> float:
    if kind == "default":
        rope.only("factor", 1.0)
        return 1.0
    if (factor := rope.number("factor")) < 1:
        raise rope.bad("factor", factor, "1 or more")
    return factor


def _bounded(rope: Section, kind: RopeType) -> Rope:
    """Read llama3 or yarn."""
    factor = _factor(rope, kind)
    original = rope.positive("original_max_position_embeddings")
    if kind == "llama3":
        bounds = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if bounds[0] >= bounds[1]:
            raise rope.bad("low_freq_factor", bounds[0], f"less than high_freq_factor, {bounds[1]}")
        return Rope(kind, factor, None, original, bounds=bounds)
    bounds = rope.number("beta_slow", 1.0), rope.number("beta_fast", 32.0)
    truncate = rope.flag("truncate", True)
    return Rope(kind, factor, None, original, _yarn_attention(rope, factor), bounds, truncate)


def _yarn_attention(rope: Section, factor: float) -> float:
    def stretch(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    if rope.raw("attention_factor", None) is not None:
        return rope.number("attention_factor")
    scales = [rope.raw(key, None) for key in ("mscale", "mscale_all_dim")]
    if all(scales):
        return stretch(rope.number("mscale")) / stretch(rope.number("mscale_all_dim"))
    return stretch(1.0)


def _longrope(rope: Section, llm: Section) -> Rope:
    """Read longrope; Phi-3 tells the original length beside it, which counts before one inside."""
    key = "original_max_position_embeddings"
    place = rope if llm.raw(key, None) is None else llm
    original, longest = place.positive(key), llm.positive("max_position_embeddings")
    rope.raw(key, None)
    factor = longest / original
    if rope.raw("factor", None) is not None:
        factor = rope.number("factor")
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if rope.raw("attention_factor", None) is not None:
        attention = rope.number("attention_factor")
    short, long = (rope.numbers(name) for name in ("short_factor", "long_factor"))
    return Rope("longrope", factor, None, original, attention, short=short, long=long)
