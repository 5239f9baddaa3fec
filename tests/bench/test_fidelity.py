"""Divergence, agreement and perplexity against PyTorch, and over chunks against whole logits."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrating import few_items
from checkpoints import GOLDEN, KV8
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.special import log_softmax as scipy_log_softmax
from scipy.stats import entropy

from internvl_edge.bench.answers.fidelity import (
    Fidelity,
    Item,
    Tokens,
    answered,
    compare,
    compare_logits,
    log_softmax,
)
from internvl_edge.bundle.seal import sealed
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding import passes as engine

IMAGE = GOLDEN / "images" / "img0.png"


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint at half precision."""
    target = tmp_path_factory.mktemp("fidelity") / "bundle"
    with few_items():
        return export_bundle(GOLDEN / "model", target, language="fp16", sensitivity=False, **KV8)


def random_logits(seed: int, rows: int = 7, vocab: int = 11) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


@given(st.integers(0, 1000), st.integers(1, 9))
def test_against_torch_and_scipy(seed: int, rows: int) -> None:
    expected, actual = random_logits(seed, rows), random_logits(seed + 1, rows)
    targets = np.random.default_rng(seed).integers(0, 11, rows)
    got = compare_logits(expected, actual, targets)
    p, q = (torch.tensor(logits).double() for logits in (expected, actual))
    divergence = torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    np.testing.assert_allclose(got.divergence, divergence.numpy(), rtol=1e-9)
    probabilities = [np.exp(scipy_log_softmax(x.numpy(), axis=1)) for x in (p, q)]
    np.testing.assert_allclose(got.divergence, entropy(*probabilities, axis=1), rtol=1e-9)
    for loss, logits in ((got.reference_loss, p), (got.loss, q)):
        exact = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        np.testing.assert_allclose(loss, exact.numpy(), rtol=1e-9)
    np.testing.assert_array_equal(got.agrees, (p.argmax(1) == q.argmax(1)).numpy())


@given(st.integers(0, 1000), st.floats(-1e4, 1e4))
def test_a_shift_of_all_logits_changes_nothing(seed: int, shift: float) -> None:
    logits = random_logits(seed).astype(np.float64)
    shifted = (logits + shift).astype(np.float32)
    # A float32 of 1e4 is known to 5e-4.
    np.testing.assert_allclose(log_softmax(shifted), log_softmax(logits), atol=2e-3)


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[0, 3e38, -3e38]], np.float32)
    got = compare_logits(logits, logits, np.array([1]))
    assert got.divergence[0] == got.loss[0] == 0


def test_summary() -> None:
    parts = [
        Tokens(np.array([0.0, 2.0]), np.array([True, False]), np.zeros(2), np.log([2.0, 8.0])),
        Tokens(np.array([1.0]), np.array([True]), np.zeros(1), np.log([4.0])),
    ]
    result = Fidelity.of(parts)
    assert (result.questions, result.tokens) == (2, 3)
    assert (result.divergence_mean, result.divergence_median, result.divergence_max) == (1, 1, 2)
    assert result.agreement.mean == pytest.approx(2 / 3)
    assert result.reference_perplexity == 1
    assert result.perplexity == pytest.approx(4)  # the geometric mean of 2, 8 and 4


@pytest.mark.parametrize("answers", ["greedy", "given"])
def test_chunks_are_the_whole(
    golden_model: InternVL, halved: Path, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 16 tokens, across which an answer may lie, against all logits at once."""
    other = InternVL.load(halved, device="cpu", threads=1)
    item = Item([Image.open(IMAGE)], "What is this?", "a picture of something " * 3)
    ids, first = answered(golden_model, item, "greedy" if answers == "greedy" else "given", 40, 2)
    expected = golden_model.logits(ids, item.images, 2)[first - 1 : -1]
    actual = other.logits(ids, item.images, 2)[first - 1 : -1]
    whole = compare_logits(expected, actual, np.asarray(ids[first:]))
    assert len(whole.loss) == len(ids) - first > (16 if answers == "given" else 0)
    monkeypatch.setattr(engine, "MAX_CHUNK", 16)
    monkeypatch.setattr("internvl_edge.bench.answers.fidelity.ROWS", 5)
    got = compare(golden_model, other, ids, first, item.images, 2)
    for field in fields(Tokens):
        # Float32 sums of another order: 1e-5 of logits of magnitude 10.
        np.testing.assert_allclose(
            getattr(got, field.name), getattr(whole, field.name), rtol=1e-3, atol=1e-5
        )
    assert whole.divergence.max() > 0


def test_pieces_from_a_position_on(golden_model: InternVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is longer than a pass of prefill; together they are the logits from there on."""
    ids = golden_model.tokenizer.encode("what is written here " * 8)
    whole = golden_model.logits(ids)
    monkeypatch.setattr(engine, "MAX_CHUNK", 16)
    assert len(ids) > 40
    for start in (0, 5, 15, 16, 17, 32, len(ids) - 1):
        pieces = list(golden_model.logit_chunks(ids, start=start))
        assert max(map(len, pieces)) <= 16
        np.testing.assert_allclose(np.concatenate(pieces), whole[start:], rtol=0, atol=1e-4)


def test_greedy_answers_are_likeliest(golden_model: InternVL) -> None:
    """Along its own greedy answer a model agrees with itself, and its losses are the least."""
    item = Item([IMAGE], "What is this?", "")
    ids, first = answered(golden_model, item, "greedy", 6, 1)
    got = compare(golden_model, golden_model, ids, first, item.images, 1)
    assert got.divergence.max() == 0
    logits = golden_model.logits(ids, item.images, 1)[first - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(axis=1), ids[first:])


def test_command(
    golden_bundle: Path, halved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": "1", "image": str(IMAGE), "question": "What?", "answers": ["x"]}]
    lines.append({"id": "2", "image": "gone.png", "question": "What?", "answers": ["x"]})
    data, report = tmp_path / "data.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["bench", "accuracy", "fidelity", str(halved), "--reference", str(golden_bundle)]
    words += ["--data", str(data), "--max-new-tokens", "3", "--max-tiles", "1", "--device", "cpu"]
    assert main([*words, "--json", str(report)]) == 0
    assert "top-1 agreement" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert (content["questions"], len(content["failures"])) == (1, 1)
    assert 1 <= content["tokens"] <= 3
    assert content["divergence_mean"] >= 0
    assert main([*words, "--max-new-tokens", "0"]) == 2
    data.write_text(json.dumps(lines[0] | {"question": "<image> <image>"}))
    assert main(words) == 2
    assert "none of 1 questions" in capsys.readouterr().err


def test_another_model_is_refused(
    golden_bundle: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = bundle / "bundle.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["spec"]["tiling"]["max_tiles"] += 1
    manifest.write_text(json.dumps(sealed(content)), encoding="utf-8")
    words = ["bench", "accuracy", "fidelity", str(bundle), "--reference", str(golden_bundle)]
    assert main([*words, "--images", "1", "--device", "cpu"]) == 2
    assert "not of the same model" in capsys.readouterr().err
