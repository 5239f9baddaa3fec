"""What overflows float16 inside an expert is found, though one operator computes all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from decoders import EXPERTS, decoder_config
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.calibration.experts import ExpertInputs
from internvl_edge.export.calibration.ranges import RangeCollector, ValueRange, sqnr_db
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.graphs.dialects import Experts
from internvl_edge.runtime import CheckpointError, InternVL, RangeError

FIXTURE = Path(__file__).parents[1] / "families" / "hf_qwen3_moe"
LAYER = "language_model.model.layers.1.mlp."
#: Of one expert's inner values, divided out again behind them.
LOUD = 3e4


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


def checkpoint_with(folder: Path, factors: dict[str, float]) -> Path:
    """A random checkpoint with experts some of whose matrices are multiplied."""
    config = decoder_config(EXPERTS["qwen3 moe"], (8, 2))
    checkpoint = write_checkpoint(folder, config, dtype=np.dtype(np.float32))
    file = checkpoint / "model.safetensors"
    state = load_file(file)
    for name, factor in factors.items():
        state[LAYER + name] = state[LAYER + name] * np.float32(factor)
    save_file(state, file)
    return checkpoint


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (
            {"experts.5.up_proj.weight": LOUD, "experts.5.down_proj.weight": 1 / LOUD},
            rf"what {LAYER}experts.0.\w+_proj.weight to .*experts.7.\w+_proj.weight"
            r" \((16 tensors\) gives|8 tensors\) reads) reaches \d",
        ),
        (
            {"experts.3.down_proj.weight": LOUD, "gate.weight": 0.01},
            r"experts.7.down_proj.weight \(8 tensors\) gives reaches \d",
        ),
    ],
    ids=["inner", "result"],
)
def test_an_expert_that_overflows_is_refused(
    tmp_path: Path, factors: dict[str, float], said: str
) -> None:
    """TensorRT, which helps elsewhere, has no such operator and is not advised."""
    checkpoint = checkpoint_with(tmp_path / "model", factors)
    with pytest.raises(RangeError, match=f"{said}.*float16 ends at 65504") as refused:
        export_bundle(checkpoint, tmp_path / "bundle", language="fp16")
    assert "dialect" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()
    export_bundle(checkpoint, tmp_path / "bundle", language="int8", options=QuantOptions(block=64))


def test_an_expert_no_token_reaches_overflows_nothing(tmp_path: Path) -> None:
    """The router's row makes it the last of all; its values are never computed."""
    checkpoint = checkpoint_with(tmp_path / "model", {"experts.0.up_proj.weight": LOUD})
    file = checkpoint / "model.safetensors"
    state = load_file(file)
    state[f"{LAYER}gate.weight"][0] = 0
    others = state[f"{LAYER}gate.weight"][1:]
    others[::2], others[1::2] = others[:1], -others[:1]  # of a row and its opposite one is positive
    save_file(state, file)
    export_bundle(checkpoint, tmp_path / "bundle", language="fp16")


def test_halves_beside_transformers(tmp_path: Path) -> None:
    """What its own class gave in float32: rounding to float16 leaves 73 dB, some of it 50."""
    checkpoint = FIXTURE / "model"
    bundle = export_bundle(checkpoint, tmp_path / "bundle", vision="fp16", language="fp16")
    model = InternVL.load(bundle, device="cpu", threads=1)
    with np.load(FIXTURE / "expected.npz") as data:
        ids, tiles = data["input_ids"].tolist(), data["tiles_u8_torchvision"]
        greedy, expected = data["greedy_ids"].tolist(), data["step_logits"]
    got = model.logits_of_tiles([*ids, *greedy[:-1]], tiles)[len(ids) - 1 :]
    assert sqnr_db(float((expected**2).sum()), float(((got - expected) ** 2).sum())) > 50


@pytest.mark.parametrize("seed", range(4))
def test_experts_are_those_of_transformers(seed: int) -> None:
    """The rows, and what they become, weighted by the shares of its own router."""
    random = np.random.default_rng(seed)
    count, chosen, hidden, width, rows = 6, 2, 16, 8, 40
    block = reference(count, chosen, hidden, width, seed)
    state = {name: value.detach().numpy() for name, value in block.state_dict().items()}
    gate, up = np.split(state["experts.gate_up_proj"], 2, axis=1)
    in_turns = np.stack([gate, up], axis=2).reshape(count * 2 * width, hidden)
    inputs = ExpertInputs()
    inputs.experts = Experts(
        Weight.held("router", state["gate.weight"]),
        Weight.held("gated", in_turns),
        Weight.held("down", state["experts.down_proj"].reshape(count * hidden, width)),
        chosen,
        normed=True,
    )
    x = random.standard_normal((rows, hidden)).astype(np.float32)
    logits = x @ state["gate.weight"].T
    for part in np.array_split(np.arange(rows), 3):
        inputs.add(x[part], logits[part])
    shares = np.exp(logits)
    shares[logits < np.sort(logits, axis=1)[:, -chosen, None]] = 0
    shares /= shares.sum(axis=1, keepdims=True)
    got = np.zeros_like(x)
    for expert, visit in enumerate(inputs.visits()):
        taken = shares[:, expert] > 0
        np.testing.assert_array_equal(visit.x, x[taken])
        got[taken] += shares[taken, expert, None] * visit.result
    with torch.inference_mode():
        found = block(torch.from_numpy(x)[None])
    expected = (found[0] if isinstance(found, tuple) else found).reshape(rows, hidden).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def reference(count: int, chosen: int, hidden: int, width: int, seed: int) -> Any:
    """transformers' own experts, with drawn weights."""
    told = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=count,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
    )
    torch.manual_seed(seed)
    block = Qwen3MoeSparseMoeBlock(told).eval()
    for place in block.parameters():
        torch.nn.init.normal_(place.data, std=0.3)
    return block


@pytest.mark.parametrize("values", [[1.0, -3.0, 2.5], [7e4, 1.0], [1e-6, 0.0], [np.nan], []])
def test_what_is_seen_is_measured_as_probes_do(values: list[float]) -> None:
    """Largest, and SQNR of rounding to float16."""
    seen: NDArray[np.float32] = np.array(values, np.float32)
    collector = RangeCollector()
    collector.see("input", "w", seen[:1])
    collector.see("input", "w", seen[1:])
    found = list(collector.values())
    if not values:
        assert found == []
        return
    (value,) = found
    assert isinstance(value, ValueRange)
    np.testing.assert_equal(value.largest, float(np.abs(seen).max()))
    assert value.overflows == (not np.abs(seen).max() < 65504)


def test_damaged_experts_are_named() -> None:
    bad = np.full((8, 4), np.nan, np.float32)
    held = Weight.held("gated", bad)
    inputs = ExpertInputs()
    inputs.experts = Experts(Weight.held("router", bad), held, held, 1, normed=True)
    inputs.add(np.zeros((1, 4), np.float32), np.zeros((1, 8), np.float32))
    with pytest.raises(CheckpointError, match="gated holds NaN or infinite values"):
        list(inputs.visits())
