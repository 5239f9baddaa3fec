"""Hugging Face's own InternVL and Llama classes as oracle, on random weights of many shapes.

transformers implements pixel shuffle v2 only; v1 is covered by the golden data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_state, small_config, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import load_reference, reference_logits, reference_rows

from internvl_edge.examples.tiny_ocr.reference import hf_model, load_v15, to_v15
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.weights import resample_positions
from internvl_edge.runtime import ExportError, InternVL

# Activations and logits are of order one to ten; float32 has 24 bits and the sums here have at
# most a few hundred terms, so agreement is to about 1e-5. Ten times that is still bit-level.
TOLERANCE = 1e-4


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs with head counts, widths and grids that share no convenient factors."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([16, 32, 48]))
    vision_heads = draw(st.sampled_from([1, 2, 5]))
    config = small_config(
        vision_kind=draw(st.sampled_from(["6b", "300m"])),
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        vision_hidden=vision_heads * draw(st.sampled_from([8, 24])),
        vision_heads=vision_heads,
        layers=draw(st.integers(1, 3)),
        vision_layers=draw(st.integers(1, 3)),
        tile=draw(st.sampled_from([28, 56, 84])),
    )
    config["llm_config"]["bias"] = draw(st.booleans())
    return config


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(config=configs(), seed=st.integers(0, 1000))
def test_export_equals_transformers(config: dict[str, Any], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(
            Path(folder) / "checkpoint", config, seed=seed, dtype=np.dtype(np.float32)
        )
        bundle = export_bundle(checkpoint, Path(folder) / "bundle")
        _compare(InternVL.load(bundle, device="cpu", threads=2), checkpoint, config, TOLERANCE)


def test_unsupported_head_size_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(hidden=48, heads=4))
    with pytest.raises(ExportError, match="head size is 12"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_sharded_bf16_checkpoint_equals_transformers(tmp_path: Path) -> None:
    config = small_config(layers=3, vision_layers=3)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, shards=4)
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    _compare(InternVL.load(bundle, device="cpu", threads=2), checkpoint, config, TOLERANCE)


@pytest.mark.parametrize("vision_kind", ["6b", "300m"])
def test_fp16_stays_close(tmp_path: Path, vision_kind: str) -> None:
    """fp16 has 11 bits: about 1e-3 a rounding, some tens of roundings deep, on values up to ten."""
    config = small_config(vision_kind=vision_kind)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", vision="fp16", language="fp16")
    model = InternVL.load(bundle, device="cpu", threads=2)
    _compare(model, checkpoint, config, 5e-2)


def test_conversion_round_trip() -> None:
    """V1-5 names -> transformers -> V1-5 names gives back every tensor, bit for bit."""
    config = small_config(heads=6, hidden=96)
    state = {name: torch.from_numpy(array) for name, array in random_state(config).items()}
    model = hf_model(config)
    load_v15(model, state)
    back = to_v15(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 4), (5, 5), (7, 3), (9, 9)])
def test_position_resampling_equals_torch(rows: int, columns: int) -> None:
    table = np.random.default_rng(0).standard_normal((1 + 16, 24)).astype(np.float32)
    patches = torch.from_numpy(table[1:]).T.reshape(1, 24, 4, 4)
    expected = torch.nn.functional.interpolate(
        patches, (rows, columns), mode="bicubic", align_corners=False
    )
    got = resample_positions(table, rows, columns)
    np.testing.assert_array_equal(got[0], table[0])
    np.testing.assert_allclose(
        got[1:],
        expected.reshape(24, -1).T.numpy(),
        rtol=0,
        atol=1e-5,  # float32 weights there
    )


def _compare(model: InternVL, checkpoint: Path, config: dict[str, Any], tolerance: float) -> None:
    reference = load_reference(checkpoint, config)
    random = np.random.default_rng(1)
    side = config["force_image_size"]
    image = random.integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)
    tiles = model.tile(image)
    assert len(tiles) == 7
    rows = model.encode_images([image])
    np.testing.assert_allclose(rows, reference_rows(reference, tiles), rtol=0, atol=tolerance)
    ids = [1, *[model.context_id] * len(rows), *random.integers(3, 490, 9).tolist()]
    expected = reference_logits(reference, ids, tiles)
    np.testing.assert_allclose(model.logits(ids, [image]), expected, rtol=0, atol=tolerance)
