"""The vision tower of every system: the same weights, the same rows; the command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from numpy.typing import NDArray

from internvl_edge.bench.peers import vision
from internvl_edge.bench.peers.mtmd import write_mtmd
from internvl_edge.bench.peers.systems import TOWER_PEERS
from internvl_edge.bench.peers.towers import TOWERS, write_tower
from internvl_edge.bench.peers.vision import median_ratio
from internvl_edge.bundle.errors import LimitError
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.runtime import InternVL

pytestmark = pytest.mark.slow(seconds=2)

TILE = 56


@pytest.fixture(scope="module", params=["6b", "300m"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = small_config(vision_kind=request.param, hidden=128, vision_hidden=128, tile=TILE)
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("tower") / "checkpoint", config))


@pytest.fixture(scope="module")
def tiles() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, TILE, TILE, 3), np.uint8)


@pytest.fixture(scope="module")
def expected(
    source: Checkpoint, tiles: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> NDArray[np.floating]:
    """Rows in float32, by this runtime."""
    bundle = export_bundle(source, tmp_path_factory.mktemp("own") / "bundle")
    return InternVL.load(bundle, device="cpu", threads=1).engine.encode_tiles(tiles)


def test_transformers(
    source: Checkpoint, tiles: NDArray[np.uint8], expected: NDArray[np.floating], tmp_path: Path
) -> None:
    tower = TOWERS["transformers tower"](write_tower(source, tmp_path / "tower"), 1)
    assert "bfloat16" in tower.features
    assert cosine(tower.encode(tiles), expected) > 0.999


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino(
    source: Checkpoint, tiles: NDArray[np.uint8], expected: NDArray[np.floating], tmp_path: Path
) -> None:
    bundle = export_bundle(
        source, tmp_path / "trt", vision="fp16", language="fp16", dialect="tensorrt"
    )
    tower = TOWERS["openvino tower"](bundle, 1)
    assert cosine(tower.encode(tiles), expected) > 0.999


@pytest.mark.skipif(
    find_spec("llama_cpp") is None or find_spec("gguf") is None,
    reason="llama-cpp-python and gguf are not installed",
)
def test_llamacpp(
    source: Checkpoint, tiles: NDArray[np.uint8], expected: NDArray[np.floating], tmp_path: Path
) -> None:
    """The large tower cut to two layers is not known to it."""
    if source.spec.vision.norm_type == "rms_norm":
        with pytest.raises(LimitError, match="by its 45 layers of 3200 only"):
            write_mtmd(source, tmp_path / "mtmd")
        assert not (tmp_path / "mtmd").exists()
        return
    tower = TOWERS["llama.cpp tower"](write_mtmd(source, tmp_path / "mtmd"), 1)
    assert cosine(tower.encode(tiles), expected) > 0.999


def test_own(
    source: Checkpoint, tiles: NDArray[np.uint8], expected: NDArray[np.floating], tmp_path: Path
) -> None:
    tower = TOWERS["internvl-edge tower"](export_bundle(source, tmp_path / "own"), 1)
    np.testing.assert_array_equal(tower.encode(tiles), expected)


def test_ratios_are_taken_turn_by_turn() -> None:
    assert median_ratio([2, 8, 2], [1, 4, 1]) == 2


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a small member: transformers is measured, what is not installed is a line."""
    small = small_config(hidden=64, vision_hidden=64, tile=TILE)
    monkeypatch.setattr("internvl_edge.bench.scale.run.CONFIGS", {"small": small})
    absent = "no-such-package"
    peers = [_without(peer, absent) for peer in TOWER_PEERS]
    monkeypatch.setattr(vision, "TOWER_PEERS", tuple(peers))
    output = tmp_path / "vision.json"
    words = ["bench", "peers", "vision", "--model", "small", "--layers", "1", "--threads", "1"]
    assert main([*words, "--tiles", "1", "2", "--repeat", "1", "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"{'OpenVINO INT8':28} not measured: {absent} not installed: pip install" in printed
    result = json.loads(output.read_text())
    (measured,) = result["peers"]
    assert measured["name"] == "transformers bf16"
    for figures in (measured["peer_s"], measured["own_s"], measured["ratio"]):
        assert figures.keys() == {"1", "2"}
        assert min(figures.values()) > 0


def _without(peer: Any, package: str) -> Any:
    """All but transformers as if they were not installed."""
    return replace(peer, packages=(package,)) if "torch" not in peer.packages else peer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gpt-2"], "unknown model 'gpt-2'"),
        (["--layers", "99"], "--layers is 99"),
        (["--tiles", "0"], "--tiles is 0"),
        (["--peer", "ollama"], "--peer 'ollama' is unknown"),
        (["--json", "none/file"], "cannot write"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", "vision", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
