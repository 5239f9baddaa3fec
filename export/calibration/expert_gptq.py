"""GPTQ of experts, each by the rows that the router gives it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from internvl_edge.export.calibration.decisions import GPTQ_ROWS, Decisions
from internvl_edge.export.calibration.experts import ExpertInputs
from internvl_edge.export.calibration.gptq import error_factors, gptq_blocks, shrunk_moments
from internvl_edge.export.formats.packing import THREADS
from internvl_edge.export.formats.quantize import BlockFormat, Blocks, Floats


def compensate_experts(inputs: ExpertInputs, form: BlockFormat) -> Decisions:
    """Quantise a layer's experts: kinds "packed" and "packed_scales" of both matrices.

    Few rows may reach one: what they say counts as far as they are sure of it.
    """
    if (experts := inputs.experts) is None:
        return {}
    done: dict[str, list[Blocks]] = {experts.gated.name: [], experts.down.name: []}
    for visit in inputs.visits():
        done[experts.gated.name] += _compensated(visit.gate_up, visit.x, form)
        done[experts.down.name] += _compensated(visit.down, visit.inner, form)
    decisions: Decisions = {}
    for name, blocks in done.items():
        decisions[f"packed:{name}"] = np.concatenate([one.packed for one in blocks])
        decisions[f"packed_scales:{name}"] = np.concatenate([one.scales for one in blocks])
    return decisions


def _compensated(matrix: Floats, x: Floats, form: BlockFormat) -> list[Blocks]:
    """Quantise `(out, in)` by what it reads `(rows, in)`, runs of its rows in parallel."""
    second = shrunk_moments(x)
    spread = error_factors(second, np.ones(matrix.shape[1], np.float32))
    importance = np.concatenate([np.diag(one) for one in second]) if x.any() else None
    runs = [matrix[start : start + GPTQ_ROWS] for start in range(0, len(matrix), GPTQ_ROWS)]
    quantize = partial(gptq_blocks, form=form, factors=spread, importance=importance)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(quantize, runs))
