"""Bundles of INT8 vision on our kernels: as accurate as on ONNX Runtime's operators, the same bits
by any number of threads and tiles; without the library, those operators."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrating import few_items
from checkpoints import GOLDEN, small_config, write_checkpoint
from sessions import cpu_session

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, TILES, VISION_GRAPH
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.graphs.dialects.probes import tower_probe
from internvl_edge.export.graphs.dialects.tower_probe import wanted_bits
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.kernels.operators.turns import Turns
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import own_kernel, sessions, tower
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.own_kernels import NO_KERNELS, OwnKernels
from internvl_edge.runtime.backends.prepared import prepared_folder
from internvl_edge.runtime.backends.tower import (
    FLOAT_TOWER,
    NO_TOWER,
    TOWER,
    bundle_tower,
    gives_known_bits,
    probe_file,
    tower_kernel,
)


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with few_items():
        return export_bundle(
            GOLDEN / "model", tmp_path_factory.mktemp("int8") / "bundle", vision="int8"
        )


@pytest.fixture
def kernel() -> OwnKernel:
    if (found := tower_kernel()).library is None:
        pytest.skip(found.name)
    return found


def test_operators_in_pieces_give_the_same_bits(kernel: OwnKernel) -> None:
    """As they are run while passes over tokens come and go."""
    assert kernel.library is not None
    turns = Turns(kernel.library)
    turns.enter(0.0)
    turns.leave()
    assert gives_known_bits(kernel)


def load(bundle: Path, threads: int = 1) -> InternVL:
    return InternVL.load(bundle, device="cpu", threads=threads, reuse_bytes=0)


def pictures(bundle: Path, count: int) -> np.ndarray:
    side = open_bundle(bundle).spec.vision.tile_size
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)


def embeddings(model: InternVL, tiles: np.ndarray) -> np.ndarray:
    return np.asarray(model.engine.backend.encode_tiles(tiles))


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_the_probe_is_what_export_writes(kernel: OwnKernel, tmp_path: Path) -> None:
    """Its bits included: another arithmetic is another probe, and other embeddings everywhere."""
    assert onnx.load(probe_file()) == tower_probe(tmp_path)


def test_the_probes_bits_are_those_of_its_operations(kernel: OwnKernel) -> None:
    """ONNX Runtime's operators give them too, but for their rounding."""
    computed = cpu_session(probe_file()).run(["y"], {tower.PROBE_INPUT: tower.probe_input()})[0]
    assert 0 < error(wanted_bits(probe_file()), computed) < 1e-3


def test_embeddings_are_as_near_the_float_ones(
    int8_bundle: Path, kernel: OwnKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = pictures(int8_bundle, 6)
    ours = embeddings(load(int8_bundle), tiles)
    monkeypatch.setattr(sessions, "vision_kernels", lambda bundle: NO_KERNELS)
    theirs = embeddings(load(int8_bundle), tiles)
    exact = embeddings(load(export_bundle(GOLDEN / "model", tmp_path / "float")), tiles)
    assert not np.array_equal(ours, theirs)  # else one of them was not what it is called
    assert error(ours, exact) < 1.1 * error(theirs, exact)


def test_products_are_the_same_bits_by_onnx_runtime(
    int8_bundle: Path, kernel: OwnKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel.kind != TOWER:
        pytest.skip(str(kernel))
    tiles = pictures(int8_bundle, 3)
    wanted = embeddings(load(int8_bundle), tiles)
    theirs = OwnKernels(tower=own_kernel.own_kernel(FLOAT_TOWER))
    monkeypatch.setattr(sessions, "vision_kernels", lambda bundle: theirs)
    np.testing.assert_array_equal(embeddings(load(int8_bundle), tiles), wanted)


def test_threads_and_batches_give_the_same_bits(int8_bundle: Path, kernel: OwnKernel) -> None:
    tiles = pictures(int8_bundle, 3)
    one, three = load(int8_bundle), load(int8_bundle, threads=3)
    wanted = embeddings(one, tiles)
    np.testing.assert_array_equal(embeddings(three, tiles), wanted)
    apart = np.concatenate([embeddings(one, tiles[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(apart, wanted)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_towers_of_both_kinds_of_norm(norm: str, kernel: OwnKernel, tmp_path: Path) -> None:
    config = small_config()
    config["vision_config"] |= {"norm_type": norm, "qk_normalization": norm == "rms_norm"}
    with few_items():
        checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
        bundle = export_bundle(checkpoint, tmp_path / "bundle", vision="int8")
    changed = kernel.give(bundle / VISION_GRAPH, ort.SessionOptions())
    assert isinstance(changed, bytes)
    nodes = onnx.load_from_string(changed).graph.node
    left = {one.op_type for one in nodes if one.domain == ""} - _EXACT
    assert not left, left
    tiles = pictures(bundle, 2)
    plain = cpu_session(bundle / VISION_GRAPH).run(None, {TILES: tiles})[0]
    assert error(embeddings(load(bundle), tiles), plain) < 0.1


#: Operators whose results are the same bits on every CPU: moves, and one rounding of each value.
_EXACT = {"Cast", "Div", "Sub", "Add", "Reshape", "Transpose", "Shape", "Slice", "Concat", "Expand"}


def test_prepared_bundles_give_the_same_bits(
    int8_bundle: Path, kernel: OwnKernel, tmp_path: Path
) -> None:
    tiles = pictures(int8_bundle, 2)
    wanted = embeddings(load(int8_bundle), tiles)
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    prepare_bundle(bundle)
    model = load(bundle)
    assert model.engine.backend.prepared
    np.testing.assert_array_equal(embeddings(model, tiles), wanted)


def test_what_is_mapped_is_not_prepared(
    kernel: OwnKernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prepared weights that are there already are left alone, and need not fit."""
    blocks = own_kernel.own_kernel(BLOCKS)
    if kernel.kind != TOWER or blocks.library is None:
        pytest.skip(f"{kernel}; {blocks}")
    with few_items():
        bundle = export_bundle(
            GOLDEN / "model", tmp_path / "bundle", vision="int8", language="int8"
        )
    assert main(["prepare", str(bundle)]) == 0
    assert "there is nothing to prepare" in capsys.readouterr().out
    assert not (bundle / "prepared").exists()
    prepared_folder(open_bundle(bundle)).mkdir(parents=True)
    model = load(bundle)
    assert model.engine.backend.mapped == {VISION_GRAPH, LANGUAGE_GRAPH}
    assert main(["inspect", "--json", str(bundle)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory"]["weights"] == "mapped as they are"
    assert report["here"]["prepared"] == "no"


def test_without_a_library_the_graph_runs_as_it_is(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_kernel, "built_library", lambda: "no C++ compiler found")
    monkeypatch.setattr(tower, "own_kernel", own_kernel.own_kernel.__wrapped__)
    found = bundle_tower(open_bundle(int8_bundle).manifest)
    assert str(found) == "onnxruntime's operators: no library (no C++ compiler found)"
    backend = load(int8_bundle).engine.backend
    assert "own vision kernels" not in backend.description
    assert np.isfinite(backend.encode_tiles(pictures(int8_bundle, 1))).all()


def test_kept_rows_are_told_apart(
    int8_bundle: Path, kernel: OwnKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load(int8_bundle).engine.backend.numerics
    monkeypatch.setattr(sessions, "vision_kernels", lambda bundle: NO_KERNELS)
    assert load(int8_bundle).engine.backend.numerics != ours


def test_other_precisions_leave_it(tmp_path: Path) -> None:
    bundle = export_bundle(GOLDEN / "model", tmp_path / "bundle")
    assert bundle_tower(open_bundle(bundle).manifest) is NO_TOWER


@pytest.mark.parametrize(
    ("operator", "name", "reason"),
    [
        ("NormRounded", "norm1", "not of every column"),
        ("IntegerAttentionRounded", "q_norm", "a norm is not of every column"),
        ("FloatProduct", "patch.bias", "bias is not of N"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    operator: str, name: str, reason: str, kernel: OwnKernel, tmp_path: Path
) -> None:
    model = onnx.load(probe_file())
    for weight in model.graph.initializer:
        if weight.name == name:
            weight.CopyFrom(onnx.numpy_helper.from_array(np.ones(5, np.float32), name))
    onnx.save(model, tmp_path / "wrong.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    opened = ort.InferenceSession(kernel.give(tmp_path / "wrong.onnx", options), options)
    with pytest.raises(Exception, match=rf"{operator}(.|\n)*{reason}"):
        opened.run(None, {tower.PROBE_INPUT: tower.probe_input()})


def test_inspect_and_doctor_say_it(
    int8_bundle: Path, kernel: OwnKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--json", str(int8_bundle)]) == 0
    assert json.loads(capsys.readouterr().out)["here"]["vision_kernels"] == kernel.name
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["vision"] == kernel.name
