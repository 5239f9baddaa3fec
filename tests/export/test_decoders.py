"""Decoder families beside transformers' own classes: random weights, shapes of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import KV8, write_checkpoint
from decoders import DECODERS, EXPERTS, HEADS, ROTARY, decoder_config, reference_logits
from dialects import RUNNABLE
from numpy.typing import NDArray

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.calibration.ranges import sqnr_db
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.inspection import inspect_checkpoint
from internvl_edge.export.tensorrt.oracle import compare_bundles, run_bundle
from internvl_edge.runtime import CheckpointError, ExportError, InternVL

LOGIT_TOLERANCE = 2e-4


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_logits(tmp_path: Path, name: str, heads: tuple[int, int]) -> None:
    compare_logits(tmp_path, decoder_config(DECODERS[name], heads))


def test_logits_of_internlm3_with_biases(tmp_path: Path) -> None:
    """It has none of the output, as Qwen2; transformers' own class of it refuses such a config."""
    decoder = {"head_dim": None, "qkv_bias": True, "attention_bias": True}
    config = decoder_config(DECODERS["internlm3"] | decoder, (4, 2))
    config["llm_config"]["rms_norm_eps"] = 1e-5
    same = decoder_config(DECODERS["qwen2"], (4, 2))
    same["llm_config"]["rms_norm_eps"] = 1e-5
    assert parse_config(config) == parse_config(same)
    compare_logits(tmp_path, config, reference=same)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bias", True, "'llm_config.bias' is True; supported: False"),
        ("mlp_bias", True, "'llm_config.mlp_bias' is True; supported: False"),
        ("attention_bias", True, "'llm_config.attention_bias' is True; supported: False"),
    ],
)
def test_internlm3_refuses_other_biases(key: str, value: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse_config(decoder_config(DECODERS["internlm3"] | {key: value}, (4, 2)))


@pytest.mark.parametrize("name", EXPERTS)
def test_logits_of_experts(tmp_path: Path, name: str) -> None:
    compare_logits(tmp_path, decoder_config(EXPERTS[name], (4, 2)))


@pytest.mark.parametrize("kind", ROTARY)
def test_logits_of_every_rotary_kind(tmp_path: Path, kind: str) -> None:
    compare_logits(tmp_path, decoder_config(DECODERS["llama"] | ROTARY[kind], (4, 2)))


def compare_logits(
    tmp_path: Path, config: dict[str, Any], reference: dict[str, Any] | None = None
) -> None:
    """Compare the logits of every position with transformers' own class, of `reference` if told."""
    checkpoint = write_checkpoint(tmp_path / "model", config, dtype=np.dtype(np.float32))
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
    ids = np.random.default_rng(0).integers(3, 259, 40).tolist()
    expected = reference_logits(reference or config, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.fixture
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


@pytest.mark.slow(seconds=30)
@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize("name", [*DECODERS, "qwen3 moe"])
def test_halves(tmp_path: Path, name: str) -> None:
    """float16 has 73 dB for one rounding, and some tens of them follow each other."""
    decoder = (DECODERS | EXPERTS)[name]
    checkpoint = write_checkpoint(tmp_path / "model", decoder_config(decoder, (8, 2)))
    exact = run_bundle(export_bundle(checkpoint, tmp_path / "float"))
    bundle = export_bundle(checkpoint, tmp_path / "half", vision="fp16", language="fp16")
    got = run_bundle(bundle, exact.rows)
    for one, other in zip(vars(exact).values(), vars(got).values(), strict=True):
        assert _sqnr(one, other) > 50


@pytest.mark.slow(seconds=60)
@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize("name", [*DECODERS, "qwen3 moe"])
def test_integers(tmp_path: Path, name: str) -> None:
    """Random weights lose what rounding loses, and one token at a time as much as a whole pass."""
    decoder = (DECODERS | EXPERTS)[name]
    checkpoint = write_checkpoint(tmp_path / "model", decoder_config(decoder, (8, 2)))
    exact = run_bundle(export_bundle(checkpoint, tmp_path / "float"))
    for language, least, kv in (("int8", 28, {}), ("int4", 8, {}), ("int4", 8, KV8)):
        wanted: dict[str, Any] = {"vision": "int8", "language": language, **kv}
        options = QuantOptions(block=64)
        bundle = tmp_path / f"{language}{kv}"
        export_bundle(checkpoint, bundle, options=options, sensitivity=False, **wanted)
        got = run_bundle(bundle, exact.rows)
        assert _sqnr(exact.rows, got.rows) > 28
        assert _sqnr(exact.whole, got.whole) > least
        assert _sqnr(exact.whole, got.stepped) > least


@pytest.mark.slow(seconds=60)
@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize("dialect", RUNNABLE)
@pytest.mark.parametrize("name", DECODERS)
def test_tensorrt_dialects(tmp_path: Path, name: str, dialect: Any) -> None:
    """The gate's comparisons with the onnxruntime dialect of the same weights hold."""
    checkpoint = write_checkpoint(tmp_path / "model", decoder_config(DECODERS[name], (8, 2)))
    for vision, language in (("fp16", "fp16"), ("int8", "int4")):
        wanted: dict[str, Any] = {"vision": vision, "language": language}
        wanted |= {"options": QuantOptions(block=64), "sensitivity": False}
        paths = [tmp_path / f"{language} {kind}" for kind in ("onnxruntime", dialect)]
        for path, kind in zip(paths, ("onnxruntime", dialect), strict=True):
            export_bundle(checkpoint, path, dialect=kind, **wanted)
        found = compare_bundles(paths[1], paths[0])
        assert len(found) == 5
        assert [one for one in found if not one.holds] == []


def _sqnr(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return sqnr_db(float((exact**2).sum()), float(((got - exact) ** 2).sum()))


@pytest.mark.parametrize(
    ("decoder", "size", "rotary"),
    [
        ("llama", "16", "theta 10000"),
        ("llama, heads of 8", "8, rotated before attention: no multiple of 16", "theta 10000"),
        ("qwen3", "32, queries and keys normed", "theta 10000"),
    ],
)
def test_inspect_says_what_a_decoder_is(
    tmp_path: Path, decoder: str, size: str, rotary: str
) -> None:
    config = decoder_config(DECODERS[decoder], (4, 2))
    report = inspect_checkpoint(write_checkpoint(tmp_path / "model", config))
    assert (report["language"]["head_size"], report["language"]["rotary"]) == (size, rotary)


def test_heads_that_no_operator_takes(tmp_path: Path) -> None:
    config = decoder_config(DECODERS["llama"] | {"head_dim": 20}, (4, 2))
    checkpoint = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(ExportError, match=r"head size is 20; .* takes multiples of 8 only"):
        export_bundle(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"dialect": "tensorrt"}, "experts.* no such operator; export for onnxruntime"),
        ({"dialect": "tensorrt-portable"}, "experts.* no such operator; export for onnxruntime"),
        (
            {"language": "int4", "options": QuantOptions(block=128)},
            r"mlp.experts.* 64 inputs.* pass a --block that divides 64",
        ),
        (
            {"language": "int4", "options": QuantOptions(block=32, symmetric=False)},
            "leave --asymmetric out",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_experts_that_are_refused(tmp_path: Path, wanted: dict[str, Any], said: str) -> None:
    config = decoder_config(EXPERTS["qwen3 moe"], (8, 2))
    checkpoint = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(ExportError, match=said):
        export_bundle(checkpoint, tmp_path / "bundle", **wanted)
    assert not (tmp_path / "bundle").exists()


def test_layers_without_experts(tmp_path: Path) -> None:
    """Every second layer, and one by name: those have an MLP of another width."""
    dense = {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4}
    config = decoder_config(EXPERTS["qwen3 moe"] | dense, (4, 2))
    language = parse_config(config).language
    assert language.dense_layers == (1, 2, 3)
    assert [language.mlp_size(layer) for layer in range(4)] == [192, 192, 192, 64]
    compare_logits(tmp_path, config)
