"""The accuracy table: a smoke run of two rows, and its interval against known values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import KV8

from internvl_edge.bench.accuracy import Score
from internvl_edge.runtime.cli import main


def test_rows_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "int8 + int4 + kv8" if KV8 else "int8 + int4"
    output = tmp_path / "table.json"
    words = ["bench", "accuracy", "--images", "3", "--threads", "1", "--json", str(output)]
    assert main([*words, "--only", "fp32", "--only", name]) == 0
    assert name in capsys.readouterr().out
    report = json.loads(output.read_text())
    plain, quantised = report["rows"]
    assert report["images"] == 3
    assert plain["score"]["total"] == quantised["score"]["total"] >= 3
    assert quantised["megabytes"] < 0.3 * plain["megabytes"]
    assert quantised["naive"]["total"] == plain["score"]["total"]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(10, 10, 72.25, 100.0), (0, 10, 0.0, 27.75), (81, 263, 25.53, 36.62)],  # Newcombe 1998
)
def test_interval(right: int, total: int, low: float, high: float) -> None:
    assert Score(right, total).interval == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("words", [["--images", "0"], ["--only", "int2"]])
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accuracy", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")
