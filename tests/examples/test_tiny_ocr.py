"""The trained tiny model: it reads pictures it has never seen, through the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracle import load_reference, reference_logits, reference_rows

from internvl_edge.bench.answers.accuracy import evaluate, held_out
from internvl_edge.bundle.extras import example_room
from internvl_edge.cli.main import main
from internvl_edge.examples.tiny_ocr.data import HELD_OUT, sample
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL

CHECKPOINT = example_room() / "checkpoint"
PICTURES = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InternVL:
    bundle = export_bundle(CHECKPOINT, tmp_path_factory.mktemp("tiny_ocr") / "bundle")
    return InternVL.load(bundle, device="cpu", threads=1)


def test_reads_held_out_pictures(model: InternVL) -> None:
    """Two turns each; the example's README is about 2,000 pictures, five standard errors above."""
    scores = evaluate(model, list(held_out(PICTURES)))
    assert len(scores) > PICTURES
    assert np.mean(scores) > 0.92


def test_equals_transformers(model: InternVL) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    reference = load_reference(CHECKPOINT, config)
    for offset in range(3):
        image, turns = sample(HELD_OUT + offset)
        tiled = model.tile_with_identity(image, None)
        ids = model.encode_conversation([(f"<image>\n{turns[0][0]}", turns[0][1])], [tiled], None)
        rows = model.encode_images([image])
        expected = reference_rows(reference, tiled.pixels())
        # Activations reach tens here; 1e-3 is five digits.
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-3)
        logits = reference_logits(reference, ids, tiled.pixels())
        np.testing.assert_allclose(model.logits(ids, [image]), logits, rtol=0, atol=2e-3)


def test_demo_answers_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["demo", "--device", "cpu", "--threads", "1"]) == 0
    first = capsys.readouterr().out
    assert first.count("(right)") == 2
    assert "7 tiles" in first
    assert main(["demo", "--device", "cpu", "--threads", "1", "--repeat", "2"]) == 0
    again = capsys.readouterr().out
    assert "already done" in again
    assert "median of 2 runs" in again


def test_weights_are_small_and_half_precision() -> None:
    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["torch_dtype"] in ("bfloat16", "float16")


def test_pictures_are_the_same_for_the_same_seed() -> None:
    first, again, other = sample(HELD_OUT), sample(HELD_OUT), sample(HELD_OUT + 1)
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(again[0]))
    assert first[1] == again[1] != other[1]
