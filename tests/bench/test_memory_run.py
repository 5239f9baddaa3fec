"""One answer in a process of its own: its memory beside the plan, its speed beside the memory's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import error_line

from internvl_edge.bench.common.limits import Weights
from internvl_edge.bench.latency import memory
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main

READ = 2e9


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of each tower of a published member, so that weights are most of the memory."""
    path = tmp_path_factory.mktemp("half") / "bundle"
    given = ["-o", str(path), "--layers", "1", "--vision", "fp16", "--language", "fp16"]
    assert main(["bench", "scale", "internvl2_5-1b", *given]) == 0
    return path


def test_an_answer_is_measured(
    integer_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "read_bandwidth", lambda threads: READ)
    file = tmp_path / "result.json"
    arguments = ["--tiles", "4", "--new-tokens", "5", "--threads", "1", "--json", str(file)]
    assert main(["bench", "memory", str(integer_bundle), *arguments]) == 0
    result = json.loads(file.read_text())
    assert result["tiles"] == 4
    assert 1 <= result["new_tokens"] == len(result["token_ids"]) <= 5
    # The answer holds at least its interpreter, and no more than is planned for it and a process.
    measured = max(result["peak_anonymous_bytes"].values())
    assert 10 << 20 < measured < result["planned_bytes"]
    assert result["peak_rss_bytes"] > measured
    weights = Weights.of(open_bundle(integer_bundle).manifest)
    read = weights.language_pass(1, result["prompt_tokens"] + result["new_tokens"] // 2).read_bytes
    share = 100 * read * result["decode_tokens_per_s"] / READ
    assert result["decode_percent_of_read"] == pytest.approx(share)


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_float16_is_planned_as_it_is_held(
    half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool
) -> None:
    """ONNX Runtime computes it in float32 on the CPU, and has both while a graph opens."""
    monkeypatch.setattr(memory, "read_bandwidth", lambda threads: READ)
    file = tmp_path / "result.json"
    arguments = ["--tiles", "1", "--new-tokens", "2", "--threads", "1", "--json", str(file)]
    arguments += ["--low-memory"] * low_memory
    assert main(["bench", "memory", str(half_bundle), *arguments]) == 0
    result = json.loads(file.read_text())
    measured = max(result["peak_anonymous_bytes"].values())
    assert measured < result["planned_bytes"] < 1.4 * measured


def test_no_picture_has_two_tiles(integer_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "bench", "memory", integer_bundle, "--tiles", "2")
    assert "--tiles is 2" in line


def test_more_tiles_than_a_picture_has(
    integer_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "bench", "memory", integer_bundle, "--tiles", "1026")
    assert "--tiles is 1026; one picture has at most 1024" in line


def test_what_fails_in_the_measured_process_is_told(
    integer_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It went on for ever, waiting for a thread that waited for its end."""
    line = error_line(capsys, "bench", "memory", integer_bundle, "--new-tokens", "0")
    assert "the measured process failed (status 1)" in line
    assert "max_new_tokens is 0, it must be at least 1" in line
