"""Rotary position embedding of every kind (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import LanguageSpec


def rope_base(spec: LanguageSpec, total_length: int) -> float:
    """Return which table a sequence of `total_length` keys is rotated by: its base theta.

    Dynamic NTK: beyond the trained length M, theta * (s * L / M - (s - 1)) ** (d / (d - 2)).
    Longrope has a second set of frequencies for long sequences, which goes by -theta.
    """
    if spec.rope_original is not None and total_length > spec.rope_original:
        return -spec.rope_theta
    trained = spec.max_position_embeddings
    if spec.rope_type != "dynamic" or total_length <= trained:
        return spec.rope_theta
    stretch = spec.rope_factor * total_length / trained - (spec.rope_factor - 1)
    return float(spec.rope_theta * stretch ** (spec.head_dim / (spec.head_dim - 2)))


def rope_rows(
    spec: LanguageSpec, rope_theta: float, start: int, stop: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return cos and sin for positions start..stop-1, each float64 `(stop - start, head_dim / 2)`.

    Args:
        rope_theta: see `rope_base`.
    """
    positions = np.arange(start, stop, dtype=np.float64)
    if spec.rope_type == "linear":
        positions /= spec.rope_factor
    angles = positions[:, np.newaxis] * _inverse_frequencies(spec, rope_theta)
    cos, sin = np.cos(angles), np.sin(angles)
    if spec.rope_attention != 1:
        cos, sin = cos * spec.rope_attention, sin * spec.rope_attention
    return cos, sin


def _inverse_frequencies(spec: LanguageSpec, rope_theta: float) -> NDArray[np.float64]:
    if rope_theta < 0:
        return np.array(spec.rope_long_frequencies)
    if spec.rope_frequencies:
        return np.array(spec.rope_frequencies)
    return np.asarray(rope_theta ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim))
