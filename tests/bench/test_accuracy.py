"""The accuracy table of tiny_ocr: a smoke run of two rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import KV8

from internvl_edge.bench.answers import accuracy
from internvl_edge.bench.common.intervals import Estimate
from internvl_edge.cli.main import main

pytestmark = pytest.mark.slow(seconds=1)


def test_rows_of_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "CALIBRATION_PICTURES", 4)
    name = "int8 + int4 + kv8" if KV8 else "int8 + int4"
    output = tmp_path / "table.json"
    words = ["bench", "accuracy", "--images", "3", "--threads", "1", "--json", str(output)]
    assert main([*words, "--only", "fp32", "--only", name]) == 0
    assert name in capsys.readouterr().out
    report = json.loads(output.read_text())
    plain, quantised = report["rows"]
    assert report["images"] == 3
    assert report["machine"]["libraries"]["onnxruntime"]
    assert plain["score"]["count"] == quantised["score"]["count"] >= 3
    assert quantised["megabytes"] < 0.3 * plain["megabytes"]
    assert quantised["naive"]["count"] == plain["score"]["count"]
    for row in report["rows"]:
        assert row["score"]["low"] <= row["right"] / row["score"]["count"] <= row["score"]["high"]
    assert plain["against_float"] is None
    change = quantised["against_float"]
    assert change["gained"] - change["lost"] == quantised["right"] - plain["right"]
    assert 0 < change["p_value"] <= 1


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(10, 10, 72.25, 100.0), (0, 10, 0.0, 27.75), (81, 263, 25.53, 36.62)],  # Newcombe 1998
)
def test_interval(right: int, total: int, low: float, high: float) -> None:
    estimate = Estimate.of([1.0] * right + [0.0] * (total - right))
    assert (100 * estimate.low, 100 * estimate.high) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "--images is 0"),
        (["--only", "int2"], "--only 'int2'"),
        (["--data", "no.jsonl"], "belong together"),
        (["BUNDLE"], "belong together"),
        (["BUNDLE", "--data", "no.jsonl"], "cannot read no.jsonl"),
        (["--metric", "anls"], "--metric is for your data"),
        (["-o", "file"], "--output is for your data"),
        (["--device", "cuda"], "on the CPU"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accuracy", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_word_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    """Behind options too, where argparse before 3.12 hands it back."""
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "accuracy", "fidelity", "a", "--reference", "b", "c"])
    assert "unrecognized arguments: c" in capsys.readouterr().err
