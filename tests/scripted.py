"""A model that answers what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import Slice


class Scripted:
    """Passes everything on, but for logits: those of the tokens of a script, one after the other,
    and then of the stop token."""

    def __init__(self, inner: Any, stop: int) -> None:
        self._inner, self._stop = inner, stop
        self.script: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._inner.forward(batch)
        forced = np.zeros_like(logits)
        forced[:, self.script.pop(0) if self.script else self._stop] = 1
        return forced


def scripted(bundle: Path, **options: Any) -> tuple[InternVL, Scripted]:
    """A model whose prompts are one pass, and what it will answer."""
    model = InternVL.load(bundle, device="cpu", threads=1, **options)
    backend = Scripted(model.engine.backend, model.stop_id)
    model.engine.backend = backend
    return model, backend
