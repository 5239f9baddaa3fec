"""Models that guess ahead whenever something is repeated, whatever the machine is doing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.pass_costs import PassCosts
from internvl_edge.runtime.decoding.speculation import Experience


class FreeRows(PassCosts):
    """Passes that take as long however many rows they have."""

    may_search = True

    def seconds(self, rows: int) -> float:
        return 1.0


def eager(model: InternVL) -> InternVL:
    """The model, to which guessing costs nothing."""
    vocab = model.spec.language.vocab_size
    model.engine.experience = Experience(vocab, costs=FreeRows())
    return model


def load_eager(bundle: Path, **options: Any) -> InternVL:
    return eager(InternVL.load(bundle, device="cpu", threads=1, **options))
