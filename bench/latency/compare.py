"""Two latency results beside each other: ratios of medians, and whether they could be chance.

    internvl-edge bench latency compare BEFORE.json AFTER.json [--json]

A ratio below one is faster. Runs of one round share its memory and its minute, so that a round's
median is one sample (a run is, where there is one round only). Figures are geometric means of the
samples; a difference and its interval are Welch's t (1947) on their logarithms, called real at a
level shared among all rows (Holm 1979): comparing many phases must not find differences by chance.
Neither tells a change of the code from other work that ran on the machine during one of the two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.bench.common.machine import MOST_DRIFT
from internvl_edge.bench.common.stored import read_result
from internvl_edge.bench.common.tables import PHASES
from internvl_edge.bundle.errors import ResultError

LEVEL = 0.05
#: Vision per tile is vision again, by a constant.
COMPARED = tuple(phase for phase in PHASES if phase != "vision_per_tile")

Key = tuple[str, int, int, int, str]


@dataclass(frozen=True)
class Difference:
    """Geometric means in seconds, their ratio and its 95% interval, and Welch's p."""

    before_s: float
    after_s: float
    ratio: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Row(Difference):
    """The difference in one phase of one point, and whether it is called real."""

    model: str
    tiles: int
    text_tokens: int
    new_tokens: int
    phase: str
    real: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; returns the exit status.

    Raises:
        ResultError: not latency results, or nothing in common.
    """
    before, after = arguments.before, arguments.after
    results = read_result(before), read_result(after)
    rows = compare(*results)
    if not rows:
        raise ResultError(f"{before} and {after} have no point in common: the same tiles, --prompt")
    notes = _notes(*results)
    if arguments.json:
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
    differences = [difference(left[key], right[key]) for key in shared]
    real = holm([found.p for found in differences], LEVEL)
    return [
        _row(key, found, verdict)
        for key, found, verdict in zip(shared, differences, real, strict=True)
    ]


def difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Compare two sets of positive samples; p is 0 or 1 where neither has any spread.

    Raises:
        ResultError: a set of one sample.
    """
    from scipy.stats import ttest_ind

    x, y = np.log(before), np.log(after)
    shift = float(np.mean(y) - np.mean(x))
    means = float(np.exp(np.mean(x))), float(np.exp(np.mean(y)))
    if min(len(x), len(y)) < 2:
        raise ResultError("one round of one run tells no spread; measure with --rounds 2 or more")
    if np.ptp(x) == 0 and np.ptp(y) == 0:
        ratio = float(np.exp(shift))
        return Difference(*means, ratio, ratio, ratio, float(shift == 0))
    test = ttest_ind(y, x, equal_var=False)
    interval = test.confidence_interval(1 - LEVEL)
    ratio, low, high = (float(np.exp(v)) for v in (shift, interval.low, interval.high))
    return Difference(*means, ratio, low, high, float(test.pvalue))


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Reject hypotheses so that any false rejection has probability `level`."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def _row(key: Key, found: Difference, real: bool) -> Row:
    model, tiles, text_tokens, new_tokens, phase = key
    return Row(
        **asdict(found),
        model=model,
        tiles=tiles,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        phase=phase,
        real=real,
    )


def _samples(result: Mapping[str, Any]) -> dict[Key, list[float]]:
    models, settings = result["models"], result["settings"]
    groups = settings["rounds"] if settings["rounds"] > 1 else settings["runs"]
    samples: dict[Key, list[float]] = {}
    for model in models:
        name = model["name"] if len(models) > 1 else ""
        for point in model["points"]:
            place = (name, point["tiles"], point["text_tokens"], point["new_tokens"])
            for phase in (phase for phase in COMPARED if phase in point["phases"]):
                values = point["phases"][phase]["samples"]
                samples[(*place, phase)] = _medians(values, groups)
    return samples


def _medians(values: Sequence[float], groups: int) -> list[float]:
    """Return medians of equal runs of the values; gaps between tokens are many a run."""
    return [float(np.median(group)) for group in np.array_split(np.asarray(values), groups)]


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs besides the bundles."""
    notes = [
        f"{name}: {before['machine'][name]} before, {after['machine'][name]} after"
        for name in ("cpu", "threads", "governor", "power_mode", "libraries")
        if before["machine"][name] != after["machine"][name]
    ]
    read = [side["ceilings"]["read_bytes_per_s"] for side in (before, after)]
    if max(read) > MOST_DRIFT * min(read):
        notes.append(f"memory read at {read[0] / 1e9:.1f} GB/s before, {read[1] / 1e9:.1f} after")
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
