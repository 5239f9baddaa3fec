"""A backend that takes several sequences in a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.backends import Slice


class Together:
    """Runs the slices of a pass one after the other on a backend of one.

    Args:
        inner: the backend of one.
        most_slices: of a pass.

    Attributes:
        passes: how many slices each pass had.
    """

    def __init__(self, inner: Any, most_slices: int) -> None:
        self._inner, self.most_slices = inner, most_slices
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        assert 1 <= len(batch) <= self.most_slices
        assert len({id(one.cache) for one in batch}) == len(batch)
        self.passes.append(len(batch))
        return np.concatenate([self._inner.forward([one]) for one in batch])
