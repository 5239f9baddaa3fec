"""What float16 cannot hold is refused at export, by name, whoever runs the graphs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from decoders import DECODERS, decoder_config
from safetensors.numpy import load_file, save_file

from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import Recipe
from internvl_edge.export.calibration.float16 import check_ranges
from internvl_edge.export.calibration.ranges import RangeCollector, ValueRange
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.runtime import ExportError, InternVL, InternVLEdgeWarning

TINY_OCR = Path(__file__).parents[2] / "examples" / "tiny_ocr" / "checkpoint"
LS2 = "vision_model.encoder.layers.0.ls2"
#: As `export` calls it.
NORM = "vision.layers.0.norm1.weight"
WQKV = "language_model.model.layers.0.attention.wqkv.weight"
W1 = "language_model.model.layers.0.feed_forward.w1.weight"
W2 = "language_model.model.layers.0.feed_forward.w2.weight"


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


def scale(checkpoint: Path, factors: dict[str, float]) -> Path:
    """Multiply tensors of a checkpoint."""
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    for name, factor in factors.items():
        state[name] = state[name].astype(np.float32) * np.float32(factor)
    save_file(state, path)
    return checkpoint


def small(folder: Path, factors: dict[str, float]) -> Path:
    config = small_config(layers=1, vision_layers=2)
    return scale(write_checkpoint(folder, config, dtype=np.dtype(np.float32)), factors)


def loud_keys(folder: Path) -> Path:
    """Keys alone are too large; what attention gives is a mean of values."""
    checkpoint = small(folder, {})
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state[WQKV][2 * 16 : 3 * 16] *= np.float32(6e4)  # the key head of the first group
    save_file(state, path)
    return checkpoint


def test_a_tower_that_overflows_is_refused(tmp_path: Path) -> None:
    """It exported without a word, and every answer was <unk> for ever."""
    checkpoint = scale(Path(shutil.copytree(TINY_OCR, tmp_path / "checkpoint")), {LS2: 3e4})
    refusal = (
        r"what vision_model\.encoder\.layers\.1\.norm1\.weight reads reaches \d\S+, float16 ends at"
        r" 65504; export with vision='fp32', export with vision='int8', or export with dialect="
    )
    with pytest.raises(ExportError, match=refusal):
        export_bundle(checkpoint, tmp_path / "bundle", vision="fp16")
    assert os.listdir(tmp_path) == ["checkpoint"]
    export_bundle(checkpoint, tmp_path / "bundle", language="fp16")  # another part


def test_a_decoder_that_overflows_is_refused(tmp_path: Path) -> None:
    """Values between two matrices; the weights themselves fit."""
    checkpoint = small(tmp_path / "checkpoint", {W1: 6e4, W2: 1e-6})
    with pytest.raises(ExportError, match=r"feed_forward.w.\.weight .*language='fp32', .*='int8'"):
        export_bundle(checkpoint, tmp_path / "bundle", language="fp16")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", vision="fp16")
    assert InternVL.load(bundle, device="cpu", threads=1).generate("Hi", max_new_tokens=2)


def test_layers_go_by_the_checkpoints_names(tmp_path: Path) -> None:
    """Another family's said nothing to whoever looked for them in the files."""
    config = decoder_config(DECODERS["qwen3"], (4, 2))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, dtype=np.dtype(np.float32))
    layer = "language_model.model.layers.0.mlp."
    scale(checkpoint, {f"{layer}gate_proj.weight": 6e4, f"{layer}down_proj.weight": 1e-6})
    with pytest.raises(ExportError, match=rf"what {layer}(gate|down)_proj.weight (gives|reads)"):
        export_bundle(checkpoint, tmp_path / "bundle", language="fp16")


@pytest.mark.parametrize("language", ["fp32", "int8"])
def test_a_float16_cache_that_overflows_is_refused(tmp_path: Path, language: Any) -> None:
    checkpoint = loud_keys(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"wqkv.weight gives reaches .*; export with kv=.fp32"):
        export_bundle(checkpoint, tmp_path / "bundle", language=language, kv="fp16")
    export_bundle(checkpoint, tmp_path / "bundle", language=language)


def test_values_near_the_end_are_named(tmp_path: Path) -> None:
    """Calibration sees few pictures: others may go further."""
    checkpoint = small(tmp_path / "checkpoint", {W1: 3e3, W2: 1e-4})
    with pytest.warns(InternVLEdgeWarning, match=r"values come near the ends of float16.*w2.*fp32"):
        export_bundle(checkpoint, tmp_path / "bundle", language="fp16")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_ordinary_model_exports_without_a_word(tmp_path: Path, precision: Any) -> None:
    checkpoint = small(tmp_path / "checkpoint", {})
    export_bundle(checkpoint, tmp_path / "bundle", vision=precision, language=precision)


@pytest.mark.parametrize("dialect", ["tensorrt", "tensorrt-portable"])
def test_a_key_that_overflows_is_refused_for_tensorrt(tmp_path: Path, dialect: Any) -> None:
    """Keys are cached in float16, and so is what the layer in float32 made of them."""
    checkpoint = loud_keys(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"wqkv.weight gives reaches .*float16 ends at 65504"):
        export_bundle(
            checkpoint, tmp_path / "bundle", vision="fp16", language="fp16", dialect=dialect
        )


def test_what_is_no_number_overflows() -> None:
    """In the float32 model already: a maximum that skips NaN would miss it."""
    collector = RangeCollector()
    collector.add(f"range:norm:{NORM}", np.array([[np.nan, np.nan, np.nan]]))
    collector.add(f"range:norm:{NORM}", np.array([[1.0, 1.0, 0.0]]))
    (value,) = collector.values()
    assert value.overflows
    source = SyntheticWeights(parse_config(small_config()))
    with pytest.raises(ExportError, match="reaches nan"):
        check_ranges([value], Recipe("fp16", "fp32", "fp32"), source)
    check_ranges([value], Recipe("int8", "fp32", "fp32"), source)
    assert not ValueRange("norm", NORM, 65504.0, 73.0).overflows
