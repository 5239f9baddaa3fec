"""The CPU matrix finds what is wrong, and says what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrix import cpus
from matrix.cpus import QUANTISED, Kind, Outcome

EXACT, ALIKE = Kind("exact"), Kind("alike", exact=False)


def outcome() -> Outcome:
    random = np.random.default_rng(0)
    exact = random.standard_normal((8, 16)).astype(np.float32)
    embeddings = {"float": exact}
    for name in QUANTISED:
        noise = random.standard_normal(exact.shape).astype(np.float32)
        embeddings[name] = exact + np.float32(0.03) * noise
    report: dict[str, Any] = {
        "demo": True,
        "form": "as stored",
        "wrong": {"as stored": [], "unsigned weights": ["w8a8"]},
        "answers": {name: ["12.50"] for name in QUANTISED},
    }
    return Outcome(report, embeddings, 1.0)


def wrong_demo(got: Outcome) -> None:
    got.report["demo"] = False


def wrong_product(got: Outcome) -> None:
    got.report["form"] = "unsigned weights"


def wrong_answer(got: Outcome) -> None:
    got.report["answers"][QUANTISED[0]] = ["13.50"]


def noisier(got: Outcome) -> None:
    name = QUANTISED[1]
    got.embeddings[name][:] += got.embeddings[name] - got.embeddings["float"]


def other_rounding(got: Outcome) -> None:
    """As much noise as before, in other places."""
    name = QUANTISED[1]
    got.embeddings[name][:] = 2 * got.embeddings["float"] - got.embeddings[name]


@pytest.mark.parametrize("spoil", [wrong_demo, wrong_product, wrong_answer, noisier])
@pytest.mark.parametrize("kind", [EXACT, ALIKE])
def test_each_fault_is_found(kind: Kind, spoil: Callable[[Outcome], None]) -> None:
    got = outcome()
    spoil(got)
    cpus._judge(kind, got, outcome())
    assert len(got.wrong) == 1


@pytest.mark.parametrize("kind", [EXACT, ALIKE])
def test_what_is_right_passes(kind: Kind) -> None:
    got = outcome()
    cpus._judge(kind, got, outcome())
    assert got.wrong == []


def test_only_an_exact_kind_must_round_alike() -> None:
    for kind, faults in ((EXACT, 1), (ALIKE, 0)):
        got = outcome()
        other_rounding(got)
        cpus._judge(kind, got, outcome())
        assert len(got.wrong) == faults


def test_a_missing_emulator_is_said(tmp_path: Path) -> None:
    with pytest.raises(cpus.Skipped, match="no-such-emulator is not installed"):
        cpus._command(Kind("other", "other", "no-such-emulator"), tmp_path)


def test_the_bound_is_said(tmp_path: Path) -> None:
    with pytest.raises(cpus.Skipped, match="bound"):
        cpus._run(cpus.KINDS[1], tmp_path, 0)
