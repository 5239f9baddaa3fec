"""Operations of a vision tower on drawn values, what they are by definition, and their arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.kernels.vision.library import Rounding

Floats = NDArray[np.float32]
KINDS = ("random", "wide", "large", "zero", "equal", "lone")


def drawn(shape: tuple[int, ...], kind: str, seed: int) -> Floats:
    """Return values of one of `KINDS`: normal, of many orders of magnitude, large, all zero, all
    the same, or all zero but one."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        x *= np.exp(random.uniform(-30, 30, shape)).astype(np.float32)
    if kind == "large":
        x *= np.float32(1e4)
    if kind == "zero":
        x[:] = 0
    if kind == "equal":
        x[:] = 0.75
    if kind == "lone":
        x *= np.arange(x.size).reshape(shape) == x.size // 2
    return x


@dataclass(frozen=True)
class NormCase:
    x: Floats
    added: Floats | None
    weight: Floats
    bias: Floats | None
    centred: bool
    epsilon: float
    rounding: Rounding | None

    def wanted(self) -> NDArray[np.float64]:
        """Return what is normed, in float64."""
        total = self.x if self.added is None else self.x + self.added
        x = total.astype(np.float64)
        x = x - x.mean(axis=1, keepdims=True) * self.centred
        size = np.sqrt((x * x).mean(axis=1, keepdims=True) + self.epsilon)
        return np.asarray(x / size * self.weight + (0 if self.bias is None else self.bias))


@dataclass(frozen=True)
class AttentionCase:
    query: Floats
    key: Floats
    value: Floats
    heads: int
    norms: tuple[Floats, Floats, float] | None
    rounding: Rounding | None

    def wanted(self) -> NDArray[np.float64]:
        """Return what is attended to, in float64."""
        query, key = self.query.astype(np.float64), self.key.astype(np.float64)
        if self.norms is not None:
            *weights, epsilon = self.norms
            query, key = (
                x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight
                for x, weight in zip((query, key), weights, strict=True)
            )
        tiles, tokens, width = query.shape
        size = width // self.heads
        query, key, value = (
            x.reshape(tiles, tokens, self.heads, size).transpose(0, 2, 1, 3)
            for x in (query, key, self.value.astype(np.float64))
        )
        scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(size)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return np.asarray((shares @ value).transpose(0, 2, 1, 3).reshape(tiles, tokens, width))


@dataclass(frozen=True)
class IntegerCase:
    x: NDArray[np.uint8]
    weight: NDArray[np.int8]
    scales: Floats
    bias: NDArray[np.int32] | None
    scale: float
    zero: int

    def wanted(self) -> Floats:
        """Return what QGemm gives: sums in integers, which wrap around, times both scales."""
        x, weight = self.x.astype(np.int64), self.weight.astype(np.int64)
        sums = (x - self.zero) @ weight.T + (0 if self.bias is None else self.bias)
        return np.asarray(sums.astype(np.int32).astype(np.float32) * self.factors)

    @property
    def factors(self) -> Floats:
        return np.float32(self.scale) * self.scales


def gelu(x: Floats) -> NDArray[np.float64]:
    erf: Callable[[Any], Any] = np.vectorize(math.erf, otypes=[np.float64])
    wide = x.astype(np.float64)
    return np.asarray(wide * 0.5 * (1 + erf(wide / math.sqrt(2))))


def rounded(values: NDArray[np.floating], rounding: Rounding) -> NDArray[np.uint8]:
    """Round as ONNX defines QuantizeLinear."""
    scaled = values if rounding.factors is None else values * rounding.factors
    whole = np.rint(scaled / np.float32(rounding.scale)) + rounding.zero
    return np.clip(whole, 0, 255).astype(np.uint8)


def rounding(columns: int, seed: int, scale: float = 0.05) -> Rounding | None:
    """Return a rounding with factors, one without, or none."""
    factors = np.random.default_rng(seed).uniform(0.5, 2, columns).astype(np.float32)
    choices = (None, Rounding(scale), Rounding(scale, 128, factors), Rounding(scale, 3))
    return choices[seed % len(choices)]


def norm_case(rows: int, width: int, kind: str = "random", seed: int = 0) -> NormCase:
    random = np.random.default_rng(seed)
    shape = rows, width
    added = drawn(shape, "random", seed + 1) if seed % 2 else None
    bias = drawn((width,), "random", seed + 2) if seed % 3 else None
    weight = random.uniform(0.5, 1.5, width).astype(np.float32)
    x = drawn(shape, kind, seed)
    return NormCase(x, added, weight, bias, bool(seed % 5 < 3), 1e-6, rounding(width, seed))


def attention_case(
    tiles: int, tokens: int, heads: int, size: int, kind: str = "random", seed: int = 0
) -> AttentionCase:
    random = np.random.default_rng(seed)
    shape = tiles, tokens, heads * size
    query, key, value = (drawn(shape, kind, seed + i) for i in range(3))
    weights = [random.uniform(0.5, 1.5, heads * size).astype(np.float32) for _ in range(2)]
    norms = (weights[0], weights[1], 1e-6) if seed % 2 else None
    return AttentionCase(query, key, value, heads, norms, rounding(heads * size, seed))


def integer_case(
    rows: int, inputs: int, columns: int, kind: str = "random", seed: int = 0
) -> IntegerCase:
    """Return a product of all bytes there are: drawn ones, or the ends only."""
    random = np.random.default_rng(seed)
    if kind == "random":
        x = random.integers(0, 256, (rows, inputs), np.uint8)
        weight = random.integers(-128, 128, (columns, inputs), np.int8)
    else:
        x = random.choice(np.array([0, 255], np.uint8), (rows, inputs))
        weight = random.choice(np.array([-128, 127], np.int8), (columns, inputs))
        x[0], weight[0] = 255, -128
        x[-1], weight[-1] = 255, 127
    bias = random.integers(-(2**31), 2**31, columns, np.int32) if seed % 3 else None
    scales = random.uniform(-1e-3, 1e-3, columns).astype(np.float32)
    return IntegerCase(x, weight, scales, bias, 0.03, (128, 0, 255, 3, 128)[seed % 5])


seeds = st.integers(0, 2**32)
kinds = st.sampled_from(KINDS)


@st.composite
def norm_cases(draw: st.DrawFn) -> NormCase:
    return norm_case(draw(st.integers(1, 5)), draw(st.integers(1, 200)), draw(kinds), draw(seeds))


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    shape = (st.integers(1, 2), st.integers(1, 80), st.integers(1, 3), st.integers(1, 70))
    return attention_case(*map(draw, shape), draw(kinds), draw(seeds))


def assert_same(results: Sequence[NDArray[Any]]) -> None:
    """Check that all paths gave the same bits."""
    for result in results[:-1]:
        assert result.tobytes() == results[-1].tobytes()


@st.composite
def integer_cases(draw: st.DrawFn) -> IntegerCase:
    shape = (st.integers(1, 30), st.integers(1, 90), st.integers(1, 70))
    kind = draw(st.sampled_from(["random", "ends"]))
    return integer_case(*map(draw, shape), kind, draw(seeds))
