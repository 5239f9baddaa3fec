"""Activation spikes, as Qwen2's decoders have them: one lane of the first token's residual stream.

A neuron that one token alone wakes writes values beyond float16 into one lane, where they stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from decoders import DECODERS, decoder_config
from half_graphs import logits_of_rows
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from internvl_edge.bundle.contract import QUANTISATION_REPORT, stored_name
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.ranges import END, sqnr_db
from internvl_edge.runtime import InternVL, RangeError

pytestmark = pytest.mark.slow(seconds=1)

FAMILIES = ("qwen2", "qwen2, tied", "qwen3", "llama", "internlm3")
LAYER = "language_model.model.layers.{}."
DOWN = f"{LAYER.format(0)}mlp.down_proj.weight"
#: The token that begins every prompt, and the lane it is loud in.
FIRST, LANE = 1, 0
HALF: dict[str, Any] = {"vision": "fp32", "language": "fp16", "kv": "fp16"}


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


@pytest.fixture(params=FAMILIES)
def spiky(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = decoder_config(DECODERS[request.param], (8, 2))
    folder = write_checkpoint(tmp_path / "model", config, dtype=np.dtype(np.float32))
    file = folder / "model.safetensors"
    state = load_file(file)
    plant(state)
    save_file(state, file)
    return folder


def plant(state: dict[str, NDArray[np.float32]]) -> None:
    """Plant a spike: no weight of it is large."""
    table = state["language_model.model.embed_tokens.weight"]
    table[:, LANE], table[FIRST] = 0, 0
    table[FIRST, LANE] = 8
    for layer in range(2):
        state[f"{LAYER.format(layer)}self_attn.o_proj.weight"][LANE] = 0
        down = state[f"{LAYER.format(layer)}mlp.down_proj.weight"]
        down[LANE] = 0
    for name in ("gate", "up"):
        rows = state[f"{LAYER.format(0)}mlp.{name}_proj.weight"]
        rows[0] = 0
        rows[0, LANE] = 10
    state[DOWN][:, 0] = 0
    state[DOWN][LANE, 0] = 60


def rows_of(bundle: Path) -> NDArray[np.float32]:
    """Embeddings of the first token and of others."""
    return np.asarray(np.load(bundle / "embedding.npy")[[FIRST, 40, 50, 60, 70]], np.float32)


@pytest.mark.parametrize("dialect", ["tensorrt", "tensorrt-portable"])
def test_spikes_are_found_and_their_layer_kept_in_float32(
    spiky: Path, tmp_path: Path, dialect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = export_bundle(spiky, tmp_path / "exact", dialect=dialect)
    guarded = export_bundle(spiky, tmp_path / "guarded", dialect=dialect, **HALF)
    report = json.loads((guarded / QUANTISATION_REPORT).read_text(encoding="utf-8"))
    found = {(one["place"], one["weight"]): one["largest"] for one in report["outside_float16"]}
    down = stored_name("layers.0.down.weight")
    assert END < found["output", down] < 40 * END
    assert found["norm", stored_name("layers.1.attention_norm.weight")] > END
    assert {weight for place, weight in found if place != "norm"} == {down}
    monkeypatch.setattr(
        "internvl_edge.export.calibration.decisions.wide_linears", lambda _: frozenset()
    )
    bare = export_bundle(spiky, tmp_path / "bare", dialect=dialect, **HALF)
    rows = rows_of(exact)
    expected, good, bad = (logits_of_rows(one, rows) for one in (exact, guarded, bare))
    signal = float((expected.astype(np.float64) ** 2).sum())
    assert sqnr_db(signal, float(((good - expected.astype(np.float64)) ** 2).sum())) > 45
    assert not np.isfinite(bad).all()


def test_spikes_are_refused_where_a_part_has_one_type(spiky: Path, tmp_path: Path) -> None:
    """ONNX Runtime's decoder in float16 has no layer of another type; INT8 and INT4 do without."""
    with pytest.raises(RangeError, match=rf"{DOWN} gives reaches .*float16 ends at 65504"):
        export_bundle(spiky, tmp_path / "half", language="fp16")
    assert not (tmp_path / "half").exists()
    bundle = export_bundle(spiky, tmp_path / "int8", language="int8", sensitivity=False)
    model = InternVL.load(bundle, device="cpu", threads=1)
    assert np.isfinite(model.logits([FIRST, 40, 50])).all()
