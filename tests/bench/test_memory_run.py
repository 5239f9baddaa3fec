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


def test_no_picture_has_two_tiles(integer_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "bench", "memory", integer_bundle, "--tiles", "2")
    assert "--tiles is 2" in line
