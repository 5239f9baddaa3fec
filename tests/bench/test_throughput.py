"""Requests that arrive by chance: the same for a seed, all answered, counted as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import error_line
from PIL import Image

from internvl_edge.bench.latency.load import Asked, Mix, draw, interfere
from internvl_edge.bench.latency.throughput import busy_seconds
from internvl_edge.cli.main import main
from internvl_edge.runtime import InternVL

COMMAND = ("bench", "latency", "throughput")
SMALL = ("--threads", "1", "--requests", "5", "--prompt", "8", "20", "--new-tokens", "3", "6")


@pytest.fixture(scope="module")
def result(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the command, with every output there is."""
    folder = tmp_path_factory.mktemp("throughput")
    files = folder / "result.json", folder / "plots.png"
    outputs = ["--json", str(files[0]), "--png", str(files[1])]
    more = ["--concurrency", "1", "3", "--beside", "3"]
    assert main([*COMMAND, str(golden_bundle), *SMALL, *more, *outputs]) == 0
    with Image.open(files[1]) as opened:
        assert opened.width > 500
    found: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    return found


def test_every_concurrency(result: dict[str, Any], golden_model: InternVL) -> None:
    mix = Mix([0, 1], [8, 20], [3, 6])
    tokens = [one.new_tokens for one in draw(golden_model, mix, 5)]
    assert [point["concurrency"] for point in result["points"]] == [1, 3]
    for point in result["points"]:
        assert point["same_answers"] == 5
        assert len(point["ttft"]["samples"]) == 5
        assert len(point["itl"]["samples"]) == sum(tokens) - 5
        assert point["tokens_per_s"] > 0
    slow, fast = (point["mean_gap_s"] for point in result["points"])
    assert slow == pytest.approx(3 * fast)


def test_a_picture_beside_answers(result: dict[str, Any]) -> None:
    beside = result["beside"]
    assert beside["tiles"] == 3
    assert beside["meanwhile"]["samples"]
    assert beside["ratio_p99"] == beside["meanwhile"]["p99"] / beside["before"]["p99"]
    assert beside["ttft_s"] > 0


def test_the_same_seed_draws_the_same(golden_model: InternVL) -> None:
    mix = Mix([0, 1, 2], [4, 40], [2, 9], seed=3)
    asked = draw(golden_model, mix, 30)
    assert asked == draw(golden_model, mix, 30)
    assert asked != draw(golden_model, Mix([0, 1, 2], [4, 40], [2, 9], seed=4), 30)
    pictures = [one.picture for one in asked if one.picture is not None]
    assert 0 < len(set(pictures)) == len(pictures) < 30  # nothing is encoded for two


def test_gaps_before_and_meanwhile_are_told_apart(golden_model: InternVL) -> None:
    late = draw(golden_model, Mix([2], [8], [2]), 1)
    others = [Asked(f"{number}?", None, None, 400, 0.0) for number in range(2)]
    found = interfere(golden_model, [*others, *late])
    assert len(found.before) >= 2 * 47
    assert found.meanwhile
    assert sum(found.meanwhile) <= 2 * found.ttft + max(found.meanwhile) * 2


@pytest.mark.parametrize(
    ("spans", "busy"),
    [([(0, 2), (1, 3)], 3), ([(5, 6), (0, 1)], 2), ([(0, 9), (2, 3)], 9), ([(1, 1)], 0)],
)
def test_idle_seconds_do_not_count(spans: list[tuple[float, float]], busy: float) -> None:
    assert busy_seconds(spans) == busy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--concurrency", "0"), "--concurrency has 0, it must be at least 1"),
        (("--requests", "0"), "--requests has 0, it must be at least 1"),
        (("--new-tokens", "1"), "--new-tokens has 1, it must be at least 2"),
        (("--load", "0"), "--load is 0.0, it must be above 0"),
        (("--beside", "0"), "--beside has 0, it must be at least 1"),
        (("--json", "no/such/folder/r.json"), "cannot write"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    golden_bundle: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert said in error_line(capsys, *COMMAND, golden_bundle, *words)
