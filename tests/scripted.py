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
    and then of the stop token. A script begins where the first pass after it was set ends."""

    def __init__(self, inner: Any, stop: int) -> None:
        self._inner, self._stop = inner, stop
        self.script: list[int] = []
        self._begun: list[int] | None = None
        self._origin = 0
        self.passes: list[int] = []  # rows of each

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        (new,) = batch
        logits: NDArray[np.float32] = self._inner.forward(batch)
        self.passes.append(len(new.rows))
        places = new.cache.state.length + new.logit_rows
        if self._begun is not self.script:
            self._begun, self._origin = self.script, int(places[-1])
        forced = np.zeros_like(logits)
        for row, place in enumerate(places - self._origin):
            forced[row, self.script[place] if place < len(self.script) else self._stop] = 1
        return forced


def scripted(bundle: Path, **options: Any) -> tuple[InternVL, Scripted]:
    """A model whose prompts are one pass, and what it will answer."""
    model = InternVL.load(bundle, device="cpu", threads=1, **options)
    backend = Scripted(model.engine.backend, model.stop_id)
    model.engine.backend = backend
    return model, backend
