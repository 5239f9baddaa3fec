"""Rotary position tables with dynamic NTK scaling (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.specs import LanguageSpec

#: Rows filled at a time, so that decoding does not call into trigonometry every step.
_BLOCK = 256


def rope_base(spec: LanguageSpec, total_length: int) -> float:
    """Base theta for a sequence of `total_length` keys.

    Dynamic NTK: beyond the trained length M, theta * (s * L / M - (s - 1)) ** (d / (d - 2)).
    """
    trained = spec.max_position_embeddings
    if spec.rope_type != "dynamic" or total_length <= trained:
        return spec.rope_theta
    stretch = spec.rope_factor * total_length / trained - (spec.rope_factor - 1)
    return float(spec.rope_theta * stretch ** (spec.head_dim / (spec.head_dim - 2)))


def rope_rows(
    spec: LanguageSpec, base: float, start: int, stop: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin for positions start..stop-1, each float64 `(stop - start, head_dim / 2)`."""
    inverse_frequency = base ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)
    positions = np.arange(start, stop, dtype=np.float64)
    if spec.rope_type == "linear":
        positions /= spec.rope_factor
    angles = positions[:, np.newaxis] * inverse_frequency
    return np.cos(angles), np.sin(angles)


class RopeTable:
    """cos and sin `(capacity, head_dim / 2)`, filled as far as needed and rebuilt per base.

    The two arrays keep their address, so a backend may bind them once.
    """

    def __init__(self, spec: LanguageSpec, capacity: int, dtype: str) -> None:
        self.cos = np.zeros((capacity, spec.head_dim // 2), dtype)
        self.sin = np.zeros_like(self.cos)
        self._spec = spec
        self._base = spec.rope_theta
        self._filled = 0

    def prepare(self, start: int, total_length: int, base: float) -> slice:
        """Make rows start..total_length-1 right for `base`; return the rows written."""
        if base != self._base:
            self._base, self._filled = base, 0
            # Only the rows of this pass are read: cached keys were rotated when they were written.
            return self._fill(start, total_length)
        if total_length > self._filled:
            stop = min(max(total_length, self._filled + _BLOCK), len(self.cos))
            begin, self._filled = self._filled, stop
            return self._fill(begin, stop)
        return slice(0, 0)

    def _fill(self, start: int, stop: int) -> slice:
        self.cos[start:stop], self.sin[start:stop] = rope_rows(self._spec, self._base, start, stop)
        return slice(start, stop)
