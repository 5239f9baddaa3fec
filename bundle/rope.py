"""Rotary position embedding with dynamic NTK scaling (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import LanguageSpec


def rope_base(spec: LanguageSpec, total_length: int) -> float:
    """Return the theta for a sequence of `total_length` keys.

    Dynamic NTK: beyond the trained length M, theta * (s * L / M - (s - 1)) ** (d / (d - 2)).
    """
    trained = spec.max_position_embeddings
    if spec.rope_type != "dynamic" or total_length <= trained:
        return spec.rope_theta
    stretch = spec.rope_factor * total_length / trained - (spec.rope_factor - 1)
    return float(spec.rope_theta * stretch ** (spec.head_dim / (spec.head_dim - 2)))


def rope_rows(
    spec: LanguageSpec, rope_theta: float, start: int, stop: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosines and sines of positions start..stop-1, each float64 `(stop - start, head_dim / 2)`."""
    inverse_frequency = rope_theta ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)
    positions = np.arange(start, stop, dtype=np.float64)
    if spec.rope_type == "linear":
        positions /= spec.rope_factor
    angles = positions[:, np.newaxis] * inverse_frequency
    return np.cos(angles), np.sin(angles)
