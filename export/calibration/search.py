"""Choosing rescaling factors and activation scales for one group of linear layers.

Dividing an input channel by s and multiplying the weight's column by s changes nothing in real
arithmetic, and moves the difficulty of rounding from one to the other. Candidates come from
SmoothQuant (Xiao et al. 2023, arXiv:2211.10438: max|x|^a / max|w|^(1-a)) and AWQ (Lin et al. 2024,
arXiv:2306.00978: mean|x|^a); the best is the one with the least error of the layer's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internvl_edge.export.formats.quantize import (
    INT8_MAX,
    BlockFormat,
    Floats,
    dequantize_blocks,
    fake_quantize_activation,
    quantize_blocks,
    quantize_channels,
)

#: Exponents tried for each family.
ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
#: Shares of the largest activation tried as the int8 range.
INPUT_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
#: Factors must bring the error down to this share. Where there are outlier channels they bring it
#: to a tenth and less; a small gain is fitted to the calibration inputs and lost on others (on the
#: golden model, W8A8 with pictures unlike the calibration's: every gain taken 24.6 dB, none
#: 31.9 dB).
LEAST_GAIN = 0.5
#: Factors beyond this only move noise around.
LARGEST_FACTOR = 1e3


@dataclass(frozen=True)
class InputStats:
    """What calibration saw of one linear layer's input of `columns` channels.

    Attributes:
        largest: max|x| per channel, over everything seen.
        mean: mean |x| per channel.
        square: mean x^2 per channel.
        rows: some of the inputs, `(rows, columns)`.
    """

    largest: Floats
    mean: Floats
    square: Floats
    rows: Floats


@dataclass(frozen=True)
class Choice:
    """Result of a search.

    Attributes:
        factors: float32 `(columns,)`: the input is divided by them, the columns multiplied.
        input_scale: of int8 activations; 0 for weight-only formats.
        error: relative squared error of the outputs with this choice.
        naive_error: the same without factors, full range.
    """

    factors: Floats
    input_scale: float
    error: float
    naive_error: float


def search(
    stats: InputStats,
    weights: Sequence[Floats],
    form: BlockFormat | None,
    *,
    tie: tuple[int, int] = (1, 1),
) -> Choice:
    """Find factors and activation scale for layers that share an input.

    Args:
        weights: some rows of each layer's matrix, `(rows, columns)` each.
        form: the block format, or None for W8A8.
        tie: (runs, repeats): the input is `runs` runs of `repeats` equal parts, and the parts of
            a run share their factors (the query heads of one KV head).
    """
    exact = [stats.rows @ weight.T for weight in weights]
    ones = np.ones(stats.rows.shape[1], np.float32)

    def evaluate(factors: Floats, ratios: Sequence[float]) -> tuple[float, float]:
        return _evaluate(stats, weights, exact, factors, form, ratios)

    naive, _ = evaluate(ones, (1.0,))
    plain = evaluate(ones, INPUT_RATIOS)
    # Over the full range first: the clipping that suits the best factors is looked for last.
    best = min(_candidates(stats, weights, tie), key=lambda factors: evaluate(factors, (1.0,)))
    rescaled = evaluate(best, INPUT_RATIOS)
    if rescaled[0] < LEAST_GAIN * plain[0]:
        return Choice(best, rescaled[1], rescaled[0], naive)
    return Choice(ones, plain[1], plain[0], naive)


def unsearched(stats: InputStats, weights: Sequence[Floats], form: BlockFormat | None) -> Choice:
    """No factors and the full range: what `search` has to beat."""
    exact = [stats.rows @ weight.T for weight in weights]
    ones = np.ones(stats.rows.shape[1], np.float32)
    error, scale = _evaluate(stats, weights, exact, ones, form, (1.0,))
    return Choice(ones, scale, error, error)


def full_scale(largest: Floats) -> float:
    """int8 scale that reaches the largest activation."""
    return max(float(largest.max()), 1e-12) / INT8_MAX


def _candidates(stats: InputStats, weights: Sequence[Floats], tie: tuple[int, int]) -> list[Floats]:
    columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    largest, mean = _tied(stats.largest, tie), _tied(stats.mean, tie)
    columns = _tied(columns, tie)
    families = [mean**alpha for alpha in ALPHAS]
    families += [largest**alpha / columns ** (1 - alpha) for alpha in ALPHAS]
    return [_normalised(factors) for factors in families]


def _tied(values: Floats, tie: tuple[int, int]) -> Floats:
    """The largest over the channels that must share a factor, at least the median of all."""
    # (runs * repeats * width) -> (runs, repeats, width)
    parts = values.reshape(*tie, -1)
    shared = np.broadcast_to(parts.max(axis=1, keepdims=True), parts.shape).reshape(-1)
    # Loud channels are turned down; quiet ones are never turned up, because other inputs than the
    # calibration's may use them.
    floor = max(float(np.median(shared)), 1e-30)
    return np.asarray(np.maximum(shared, floor), np.float32)


def _normalised(factors: Floats) -> Floats:
    centred = factors / np.sqrt(factors.max() * factors.min())
    return np.asarray(np.clip(centred, 1 / LARGEST_FACTOR, LARGEST_FACTOR), np.float32)


def _evaluate(
    stats: InputStats,
    weights: Sequence[Floats],
    exact: Sequence[Floats],
    factors: Floats,
    form: BlockFormat | None,
    ratios: Sequence[float],
) -> tuple[float, float]:
    """Relative squared error of the outputs, and the activation scale that gives it."""
    x = stats.rows / factors
    scaled = [_fake_weight(weight * factors, form) for weight in weights]
    if form is not None:
        return _error(x, scaled, exact), 0.0
    full = full_scale(stats.largest / factors)
    results = []
    for ratio in ratios:
        scale = full * ratio
        results.append((_error(fake_quantize_activation(x, scale), scaled, exact), scale))
    return min(results)


def _fake_weight(weight: Floats, form: BlockFormat | None) -> Floats:
    if form is not None:
        blocks = quantize_blocks(weight, form, ratios=(1.0,))
        return dequantize_blocks(blocks, form, weight.shape[1])
    values, scales = quantize_channels(weight)
    return np.asarray(values * scales[:, np.newaxis])


def _error(x: Floats, weights: Sequence[Floats], exact: Sequence[Floats]) -> float:
    total = 0.0
    for weight, y in zip(weights, exact, strict=True):
        total += float(((x @ weight.T - y) ** 2).sum() / max(float((y**2).sum()), 1e-30))
    return total / len(weights)
