"""Layer by layer through transformers: agrees with the runtime, and notices when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibrating import few_items
from checkpoints import KV8, small_config, write_checkpoint
from command_line import error_line

from internvl_edge.bench.answers import layerwise
from internvl_edge.bundle.contract import CachePrecision, LanguagePrecision
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions

COMMAND = ("bench", "accuracy", "layerwise", "--threads", "1", "--prompt", "9")


def write_bundle(
    folder: Path,
    language: LanguagePrecision,
    *,
    symmetric: bool = True,
    kv: CachePrecision | None = None,
) -> Path:
    config = small_config(hidden=128, heads=8, kv_heads=2)
    checkpoint = write_checkpoint(folder / "checkpoint", config)
    options = QuantOptions(block=32, naive=True, symmetric=symmetric)
    with few_items():
        return export_bundle(
            checkpoint,
            folder / "bundle",
            language=language,
            kv=kv,
            options=options,
            sensitivity=False,
        )


# As run, inputs are rounded to int8 by block and row where weights are integers.
@pytest.mark.parametrize(
    ("language", "kv", "least"),
    [
        ("fp32", None, 0.999999),
        ("int8", None, 0.999),
        ("int4", None, 0.999),
        pytest.param(
            "int4",
            "int8",
            0.99,
            marks=pytest.mark.skipif(not KV8, reason="this onnxruntime has no int8 cache"),
        ),
    ],
)
def test_logits_are_the_runtimes(
    tmp_path: Path, language: LanguagePrecision, kv: CachePrecision | None, least: float
) -> None:
    bundle, file = write_bundle(tmp_path, language, kv=kv), tmp_path / "result.json"
    assert main([*COMMAND, str(bundle), "--new-tokens", "6", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["as_run"]["cosine_least"] > least
    assert result["unrounded"]["cosine_least"] > 0.999999
    assert result["unrounded"]["same"] == result["tokens"] >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "bundle", "result.json"}


def test_another_token_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path, "fp32")
    exact = layerwise.reference_logits
    monkeypatch.setattr(layerwise, "reference_logits", lambda *given: -exact(*given))
    assert main([*COMMAND, str(bundle), "--new-tokens", "4"]) == 1
    assert capsys.readouterr().out.startswith("as run: 0 of")


def test_asymmetric_blocks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path, "int4", symmetric=False)
    assert "symmetric" in error_line(capsys, *COMMAND, bundle, "--new-tokens", "2")
