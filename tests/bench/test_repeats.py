"""Real answers told by another bundle, with guesses and without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from internvl_edge.bench.answers.receipts import KINDS
from internvl_edge.bench.answers.repeats import SLOT, Answered
from internvl_edge.bench.latency.speculation import ROWS, Figures, Told, every_kind, pass_seconds
from internvl_edge.bundle.extras import example_room
from internvl_edge.cli.main import main
from internvl_edge.runtime import InternVL, Timings


@pytest.fixture(scope="module")
def reader() -> InternVL:
    return InternVL.load(example_room() / "bundle", device="cpu", threads=1, verify="size")


@pytest.fixture(scope="module")
def kinds(reader: InternVL) -> dict[str, list[Answered]]:
    return every_kind(reader, 60)


def test_answers_are_the_models_own(reader: InternVL, kinds: dict[str, list[Answered]]) -> None:
    """In their prompts is what they repeat, or nothing of it."""
    texts = {
        name: [(list(one.prompt), reader.tokenizer.decode(one.answer[:-1])) for one in kind]
        for name, kind in kinds.items()
    }
    known = 0
    for prompt, text in texts["lines read again"]:
        told = reader.tokenizer.decode([token for token in prompt if token != SLOT])
        known += text in told
    assert known > len(texts["lines read again"]) / 2
    for prompt, text in texts["lines, nothing before"]:
        assert prompt.count(SLOT) % 16 == 0 < prompt.count(SLOT)
        assert text not in reader.tokenizer.decode([token for token in prompt if token != SLOT])
    for kind in kinds.values():
        lengths = [len(one.answer) for one in kind]
        assert sum(lengths) >= 60 > sum(lengths[:-1])


def test_recorded_tokens_are_told(golden_bundle: Path, kinds: dict[str, list[Answered]]) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    for kind in kinds.values():
        found = Told(model).measure(kind, 7)
        assert found.tokens == sum(len(one.answer) - 1 for one in kind)
        assert found.accepted == found.tokens - found.passes <= found.drafted
        assert found.seconds > 0 < found.plain_seconds


def test_figures_add_up() -> None:
    found = Figures()
    timings = Timings(token_s=[1.0, 2.0, 2.0, 3.0], drafted_tokens=5, accepted_tokens=1)
    found.add(timings, Timings(token_s=[1.0, 2.0, 3.0, 5.0]))
    assert (found.answers, found.tokens, found.passes) == (1, 3, 2)
    assert found.rates == {
        "tokens_per_s": 1.5,
        "plain_tokens_per_s": 0.75,
        "ratio": 2.0,
        "median_ratio": 2.0,
    }


def test_passes_are_timed_behind_a_prompt(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    seconds = pass_seconds(model, golden_bundle, 2)
    assert tuple(seconds) == ROWS
    assert all(np.isfinite(list(seconds.values())))
    assert min(seconds.values()) > 0


def test_the_command(
    golden_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "figures.json"
    given = ["--threads", "1", "--tokens", "20", "--repeat", "1", "--json", str(stored)]
    assert main(["bench", "latency", "speculation", str(golden_bundle), *given]) == 0
    result = json.loads(stored.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert set(KINDS) < set(result["answers"])
    for name, figures in result["answers"].items():
        assert name in printed
        assert figures["tokens"] >= 10
    assert set(result["pass_seconds"]) == {str(rows) for rows in ROWS}
