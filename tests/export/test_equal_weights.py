"""One model's weights as each family stores them: the same bundle, and no worse in integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint, write_config
from numpy.typing import NDArray
from safetensors.numpy import save_file

from internvl_edge.bundle.contract import LANGUAGE_FILES, VISION_FILES
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.calibration.ranges import sqnr_db
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.names import is_language, tensor_shapes
from internvl_edge.export.checkpoint.origin import stored_shapes
from internvl_edge.export.tensorrt.oracle import Outputs, run_bundle

#: Families whose mathematics is InternLM2's without biases.
SAME: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
    "internlm3": {"architectures": ["InternLM3ForCausalLM"], "head_dim": None},
}
#: Those that have tensors of their own: biases of zero, norms of one, experts that are all alike.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "qwen3 moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "moe_intermediate_size": 384,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
#: Integers of one checkpoint may lose so much more than another's of equal weights: which rows
#: calibration looks at follows the stored order.
SLACK = 1.1
DRAWS = (0, 1, 2)


def first_config() -> dict[str, Any]:
    return small_config(hidden=128, heads=8, vision_hidden=64, vision_layers=1)


def rewritten(source: Checkpoint, folder: Path, changed: dict[str, Any]) -> Path:
    """The same weights as another family stores them."""
    config = first_config()
    del config["llm_config"]["bias"]
    config["llm_config"] |= changed
    write_config(folder, config)
    described = describe_config(config)
    table = described.tensors()
    own = tensor_shapes(described.spec)
    shapes = stored_shapes(table, own)
    stored: dict[str, NDArray[np.float32]] = {n: np.empty(s, np.float32) for n, s in shapes.items()}
    for name, origin in table.items():
        values = values_of(source, name, own[name])
        assert origin.order is None or "experts" in name
        start = 0
        for part in origin.parts:
            place = stored[part.name][part.start : part.stop]
            place[...] = values[start : start + len(place)]
            start += len(place)
    save_file(stored, folder / "model.safetensors")
    return folder


def values_of(source: Checkpoint, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor's values, in the order they are stored in."""

    def read(other: str) -> NDArray[np.float32]:
        return np.concatenate([block.astype(np.float32) for block in source.blocks(other)])

    prefix, _, kind = name.removesuffix(".weight").rpartition(".")
    if kind == "router":
        return np.random.default_rng(len(prefix)).standard_normal(shape, np.float32) / 10
    if kind == "experts_gated":
        pair = np.concatenate([read(f"{prefix}.gate.weight"), read(f"{prefix}.up.weight")])
        return np.tile(pair, (shape[0] // len(pair), 1))
    if kind == "experts_down":
        down = read(f"{prefix}.down.weight")
        return np.tile(down, (shape[0] // len(down), 1))
    if kind in ("q_norm", "k_norm") and is_language(name):
        return np.ones(shape, np.float32)
    return np.zeros(shape, np.float32) if name.endswith("qkv.bias") else read(name)


@pytest.fixture
def first(tmp_path: Path) -> Checkpoint:
    return Checkpoint(write_checkpoint(tmp_path / "internlm2", first_config()))


@pytest.mark.parametrize("name", SAME)
def test_bundles_are_equal(first: Checkpoint, tmp_path: Path, name: str) -> None:
    other = rewritten(first, tmp_path / name, SAME[name])
    bundles = [
        export_bundle(checkpoint, tmp_path / f"bundle {i}")
        for i, checkpoint in enumerate((first.directory, other))
    ]
    for file in (*VISION_FILES, *LANGUAGE_FILES, "embedding.npy"):
        ours, theirs = ((bundle / file).read_bytes() for bundle in bundles)
        assert ours == theirs, file
    parts = [json.loads((bundle / "bundle.json").read_text())["parts"] for bundle in bundles]
    assert parts[0] == parts[1]


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("language", ["int8", "int4"])
@pytest.mark.parametrize("name", SAME | OTHERS)
def test_integers_lose_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, language: Any
) -> None:
    """KL divergence of the logits and SQNR of the image rows, each from the family's own floats.

    Heads that are normed attend otherwise: there the mean of several draws is compared.
    """
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)
    found = []
    for seed in DRAWS if "qwen3" in name else DRAWS[:1]:
        folder = tmp_path / f"draw {seed}"
        first = write_checkpoint(folder / "internlm2", first_config(), seed=seed)
        other = rewritten(Checkpoint(first), folder / "other", (SAME | OTHERS)[name])
        found.append([lost(checkpoint, language) for checkpoint in (first, other)])
    (divergence, sqnr), (others_divergence, others_sqnr) = np.mean(found, 0)
    assert divergence > 0
    assert others_divergence < SLACK * divergence
    assert others_sqnr > sqnr - 0.1


def lost(checkpoint: Path, language: Any) -> tuple[float, float]:
    """Mean KL divergence of the logits in nats, and SQNR of the image rows in decibels."""
    exact = run_bundle(export_bundle(checkpoint, checkpoint.with_name(f"{checkpoint.name} float")))
    bundle = export_bundle(
        checkpoint,
        checkpoint.with_name(f"{checkpoint.name} {language}"),
        vision="int8",
        language=language,
        options=QuantOptions(block=32),
        sensitivity=False,
    )
    got = run_bundle(bundle, exact.rows)
    return _divergence(exact, got), _sqnr(exact.rows, run_bundle(bundle).rows)


def _sqnr(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return sqnr_db(float((exact**2).sum()), float(((got - exact) ** 2).sum()))


def _divergence(exact: Outputs, got: Outputs) -> float:
    """Mean KL divergence in nats of the logits' distributions."""
    p, q = (_log_softmax(outputs.whole.astype(np.float64)) for outputs in (exact, got))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
