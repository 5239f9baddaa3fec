"""How much of a model must stay at half precision for its answers to stay within a stated loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import OptionsError
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.export.calibration.calibrate import Sample
from internvl_edge.export.calibration.decisions import Decisions, QuantOptions, Recipe
from internvl_edge.export.calibration.report import most_sensitive, unit_costs
from internvl_edge.export.calibration.sensitivity import divergence
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.export.writer import write_files
from internvl_edge.runtime.model import InternVL

#: Calibration sequences the divergence is measured on, and rows at the end of each: what comes
#: after the image.
SEQUENCES, ROWS = 8, 32


def within_budget(
    source: WeightSource,
    recipe: Recipe,
    decisions: Decisions,
    samples: Sequence[Sample],
    tokenizer: Sequence[Path],
    budget: float,
    scratch: Path,
) -> QuantOptions:
    """The recipe's options with the least `keep_worst` that meets the budget, by bisection.

    Args:
        budget: mean KL divergence in nats of the quantised logits from the float ones.
        scratch: folder for one bundle at a time.

    Raises:
        OptionsError: not even keeping every unit is enough.
    """
    judge = Judge(source, decisions, samples, tokenizer, scratch)
    exact = judge.logits(replace(recipe, vision="fp32", language="fp32", kv="fp32"))

    def meets(keep: int) -> bool:
        kept = most_sensitive(unit_costs(decisions), keep)
        options = replace(recipe.options, keep_fp16=(*recipe.options.keep_fp16, *kept))
        return divergence(exact, judge.logits(replace(recipe, options=options))) <= budget

    low, high = 0, len(unit_costs(decisions))
    if not meets(high):
        raise OptionsError(
            f"a KL divergence of {budget} cannot be met: the KV cache alone, or half precision,"
            " loses more",
            [Remedy.RAISE_BUDGET],
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return replace(recipe.options, keep_worst=low)


class Judge:
    """Runs the model under different recipes over the same sequences."""

    def __init__(
        self,
        source: WeightSource,
        decisions: Decisions,
        samples: Sequence[Sample],
        tokenizer: Sequence[Path],
        scratch: Path,
    ) -> None:
        self._source = source
        self._decisions = decisions
        self._samples = samples[:SEQUENCES]
        self._tokenizer = tokenizer
        self._scratch = scratch

    def logits(self, recipe: Recipe) -> NDArray[np.float32]:
        """Logits of the last rows of every sequence, `(sequences * ROWS, vocab)`."""
        with scratch_folder(self._scratch) as folder:
            bundle = folder / "bundle"
            bundle.mkdir()
            write_files(self._source, bundle, recipe, self._decisions, tokenizer=self._tokenizer)
            model = InternVL.load(bundle, device="cpu", verify="size")
            parts = [model.logits_of_tiles(s.ids.tolist(), s.tiles)[-ROWS:] for s in self._samples]
        return np.concatenate(parts)
