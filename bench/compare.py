"""Two latency results beside each other: ratios of medians, and whether they could be chance.

    internvl-edge bench compare BEFORE.json AFTER.json [--json]

A ratio below one is faster. Its interval is a percentile bootstrap of the medians (Efron 1979); a
difference is called real where the two samples differ by the Mann-Whitney test (1947), at a level
shared among all rows (Holm 1979): comparing many phases must not find differences by chance.
Neither tells a change of the code from other work that ran on the machine during one of the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.bench.stored import read_result
from internvl_edge.bench.tables import PHASES
from internvl_edge.runtime.errors import LimitError

LEVEL = 0.05
RESAMPLES = 2000
#: Vision per tile is vision again, by a constant.
COMPARED = tuple(phase for phase in PHASES if phase != "vision_per_tile")

Key = tuple[str, int, int, int, str]


@dataclass(frozen=True)
class Row:
    """One phase of one point in both results; seconds are medians."""

    model: str
    tiles: int
    text_tokens: int
    new_tokens: int
    phase: str
    before_s: float
    after_s: float
    ratio: float
    low: float
    high: float
    p: float
    real: bool


def run_compare(before: Path, after: Path, *, as_json: bool) -> int:
    """Compare and print; returns the exit status.

    Raises:
        LimitError: not latency results, or nothing in common.
    """
    results = read_result(before), read_result(after)
    rows = compare(*results)
    if not rows:
        raise LimitError(f"{before} and {after} have no point in common: the same tiles, --prompt")
    notes = _notes(*results)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "notes": notes}, indent=1))
    else:
        print("\n".join(_render(rows, notes)))
    return 0


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Rows of every phase both results have.

    Bundles are matched by name and, where each result has one only, as they are.
    """
    left, right = _samples(before), _samples(after)
    shared = [key for key in left if key in right]
    tests = [_p_value(left[key], right[key]) for key in shared]
    real = holm(tests, LEVEL)
    return [
        _row(key, left[key], right[key], p, verdict)
        for key, p, verdict in zip(shared, tests, real, strict=True)
    ]


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses are rejected, so that any false rejection has probability `level`."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def ratio_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of medians, seeded."""
    random = np.random.default_rng(0)
    medians = [
        np.median(random.choice(np.asarray(values), (RESAMPLES, len(values))), axis=1)
        for values in (before, after)
    ]
    low, high = np.percentile(medians[1] / medians[0], [2.5, 97.5])
    return float(low), float(high)


def _samples(result: Mapping[str, Any]) -> dict[Key, list[float]]:
    models = result["models"]
    samples: dict[Key, list[float]] = {}
    for model in models:
        name = model["name"] if len(models) > 1 else ""
        for point in model["points"]:
            place = (name, point["tiles"], point["text_tokens"], point["new_tokens"])
            for phase in (phase for phase in COMPARED if phase in point["phases"]):
                values = point["phases"][phase]["samples"]
                if phase == "itl":
                    values = _run_medians(values, point["new_tokens"] - 1)
                samples[(*place, phase)] = values
    return samples


def _run_medians(gaps: Sequence[float], count: int) -> list[float]:
    """Of each run's `count` gaps: those of one run share its luck and are no sample each."""
    return [float(np.median(gaps[at : at + count])) for at in range(0, len(gaps), count)]


def _p_value(before: Sequence[float], after: Sequence[float]) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(before, after).pvalue)


def _row(key: Key, before: Sequence[float], after: Sequence[float], p: float, real: bool) -> Row:
    medians = float(np.median(before)), float(np.median(after))
    low, high = ratio_interval(before, after)
    return Row(*key, *medians, medians[1] / medians[0], low, high, p, real)


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What else differs than the bundles."""
    notes = [
        f"{name}: {before['machine'][name]} before, {after['machine'][name]} after"
        for name in ("cpu", "threads", "governor", "power_mode", "libraries")
        if before["machine"][name] != after["machine"][name]
    ]
    sides = (("before", before), ("after", after))
    return notes + [f"{side}: {note}" for side, result in sides for note in result["notes"]]


def _render(rows: Sequence[Row], notes: Sequence[str]) -> Iterator[str]:
    yield (
        f"{'phase':22} {'tiles':>5} {'text':>5} {'new':>4} {'before ms':>10} {'after ms':>10}"
        f" {'ratio':>6} {'95% interval':>14} {'p':>7}"
    )
    for row in rows:
        name = f"{row.model} {PHASES[row.phase]}".strip()
        yield (
            f"{name:22} {row.tiles:5d} {row.text_tokens:5d} {row.new_tokens:4d}"
            f" {row.before_s * 1e3:10.3f} {row.after_s * 1e3:10.3f} {row.ratio:6.2f}"
            f" {row.low:6.2f} to {row.high:4.2f} {row.p:7.1g}" + ("  real" if row.real else "")
        )
    yield f"real: differs at the {LEVEL:.0%} level over all {len(rows)} rows together"
    yield from (f"note: {note}" for note in notes)
