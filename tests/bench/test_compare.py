"""A real difference is found, noise is not, and SciPy agrees about the intervals."""

from __future__ import annotations

import copy
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import error_line
from scipy.stats import t

from internvl_edge.bench.common.stored import write_result
from internvl_edge.bench.common.summaries import summarise
from internvl_edge.bench.latency.compare import _notes, compare, difference, holm
from internvl_edge.bundle.errors import LimitError
from internvl_edge.cli.main import main

pytestmark = pytest.mark.slow(seconds=1)

RUNS = 30


def noisy(result: dict[str, Any], seed: int, factors: dict[str, float]) -> dict[str, Any]:
    """The same result with new samples: 10 ms, 5% of noise, some phases a factor slower."""
    random = np.random.default_rng(seed)
    result = copy.deepcopy(result)
    result["settings"] |= {"rounds": 1, "runs": RUNS}
    for model in result["models"]:
        for point in model["points"]:
            for name in point["phases"]:
                samples = 0.01 * factors.get(name, 1.0) * random.normal(1, 0.05, RUNS)
                summary = vars(summarise(samples.tolist()))
                point["phases"][name] = summary | {"samples": samples.tolist()}
    return result


def test_a_real_difference_is_found(result: dict[str, Any]) -> None:
    rows = compare(noisy(result, 0, {}), noisy(result, 1, {"prefill": 1.2, "itl": 0.8}))
    assert len(rows) == 5 + 8  # phases without and with a picture
    for row in rows:
        assert row.real == (row.phase in ("prefill", "itl"))
        expected = {"prefill": 1.2, "itl": 0.8}.get(row.phase, 1.0)
        assert row.ratio == pytest.approx(expected, rel=0.05)
        assert row.low <= row.ratio <= row.high


def test_noise_is_not_a_difference(result: dict[str, Any]) -> None:
    """The level is of a whole table: at 5%, more than 6 tables of 40 come by chance in 0.3%."""
    found = [
        any(
            row.real
            for row in compare(noisy(result, 2 * seed, {}), noisy(result, 2 * seed + 1, {}))
        )
        for seed in range(40)
    ]
    assert sum(found) <= 6


def test_a_round_is_one_sample(result: dict[str, Any]) -> None:
    """A slow round of many gaps is one slow round: pooled, its gaps would look like evidence."""
    before, after = copy.deepcopy(result), copy.deepcopy(result)
    for other, slow in ((before, 0.010), (after, 0.012)):
        other["settings"] |= {"rounds": 3, "runs": 1}
        point = other["models"][0]["points"][0]
        point["new_tokens"] = 101
        gaps = [0.010] * 100 + [0.011] * 100 + [slow] * 100
        point["phases"]["itl"]["samples"] = gaps
    row = next(row for row in compare(before, after) if row.phase == "itl")
    assert row.new_tokens == 101
    assert row.before_s == pytest.approx((0.010 * 0.011 * 0.010) ** (1 / 3))
    assert not row.real
    assert row.p > 0.05


def test_another_memory_is_told(result: dict[str, Any]) -> None:
    before, after = noisy(result, 0, {}), noisy(result, 1, {})
    before["ceilings"]["read_bytes_per_s"] = 60e9
    for read, told in ((55e9, False), (44e9, True), (80e9, True)):
        after["ceilings"]["read_bytes_per_s"] = read
        notes = "\n".join(_notes(before, after))
        assert (f"memory read at 60.0 GB/s before, {read / 1e9:.1f} after" in notes) == told


def test_rounds_that_differ_are_not_a_difference(result: dict[str, Any]) -> None:
    """Runs agree within a round to 1%, rounds to 10%: the runs are no independent samples."""
    random = np.random.default_rng(5)

    def measured() -> dict[str, Any]:
        drawn = noisy(result, 0, {})
        drawn["settings"] |= {"rounds": 5, "runs": RUNS // 5}
        for point in drawn["models"][0]["points"]:
            for phase in point["phases"].values():
                rounds = np.repeat(random.normal(0.01, 0.001, 5), RUNS // 5)
                phase["samples"] = (rounds * random.normal(1, 0.01, RUNS)).tolist()
        return drawn

    found = [any(row.real for row in compare(measured(), measured())) for _ in range(40)]
    assert sum(found) <= 6


def test_a_result_equals_itself(result: dict[str, Any]) -> None:
    for row in compare(result, result):
        assert row.ratio == 1.0
        assert not row.real


def test_difference_is_welchs() -> None:
    """The formulas of Welch (1947), written out."""
    before, after = [10.0, 11.0, 12.5, 9.5], [12.0, 14.5, 13.0]
    x, y = np.log(before), np.log(after)
    errors = np.var(x, ddof=1) / len(x), np.var(y, ddof=1) / len(y)
    freedom = sum(errors) ** 2 / sum(e**2 / (n - 1) for e, n in zip(errors, (4, 3), strict=True))
    shift, error = y.mean() - x.mean(), float(np.sqrt(sum(errors)))
    reach = t.ppf(0.975, freedom) * error
    found = difference(before, after)
    assert found.p == pytest.approx(2 * t.sf(shift / error, freedom))
    assert (found.low, found.ratio, found.high) == pytest.approx(
        tuple(np.exp((shift - reach, shift, shift + reach)))
    )


def test_without_spread() -> None:
    assert difference([2.0, 2.0], [2.0, 2.0]).p == 1.0
    found = difference([2.0, 2.0], [3.0, 3.0])
    assert astuple(found) == pytest.approx((2.0, 3.0, 1.5, 1.5, 1.5, 0.0))
    with pytest.raises(LimitError, match="--rounds 2"):
        difference([2.0], [3.0])


@pytest.mark.parametrize(
    ("p_values", "rejected"),
    [
        ([], []),
        ([0.04], [True]),
        ([0.01, 0.04, 0.03], [True, False, False]),  # 0.01 <= 0.05/3; 0.03 > 0.05/2
        ([0.03, 0.01, 0.02], [True, True, True]),  # 0.01, then 0.02 <= 0.05/2, then 0.03
        ([0.5, 0.001], [False, True]),
    ],
)
def test_holm(p_values: list[float], rejected: list[bool]) -> None:
    assert holm(p_values, 0.05) == rejected


def test_bundles_are_matched_by_name(result: dict[str, Any]) -> None:
    (model,) = result["models"]
    renamed = copy.deepcopy(result)
    renamed["models"][0]["name"] = "other"
    assert len(compare(result, renamed)) == 13  # one each: whatever their names
    result["models"] = [model, copy.deepcopy(model) | {"name": "second"}]
    assert len(compare(result, result)) == 26
    assert compare(result, renamed) == []


def test_command(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "before.json", tmp_path / "after.json"
    after = noisy(result, 1, {"vision": 2.0})
    after["machine"]["cpu"] = "another"
    for file, content in zip(files, (noisy(result, 0, {}), after), strict=True):
        write_result(content, file)
    arguments = ["bench", "latency", "compare", *map(str, files)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if line.startswith("vision  "))
    assert line.endswith("real")
    assert "after: another" not in text
    assert "another after" in text
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["phase"] for row in rows if row["real"]] == ["vision"]


def test_nothing_in_common(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(result, tmp_path / "before.json")
    for point in result["models"][0]["points"]:
        point["text_tokens"] += 1
    write_result(result, tmp_path / "after.json")
    line = error_line(
        capsys, "bench", "latency", "compare", tmp_path / "before.json", tmp_path / "after.json"
    )
    assert "no point in common" in line
