"""Range analysis: what float16 does not hold is found by name, and the export then holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from half_graphs import embeddings_of_a_tile, logits_of_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import QUANTISATION_REPORT, Tensor
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.calibration.float16 import check_ranges
from internvl_edge.export.calibration.ranges import (
    LARGEST,
    RangeCollector,
    RangeProbes,
    ValueRange,
    ranges_of,
    sqnr_db,
    wide_linears,
)
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.tensorrt.oracle import run_bundle
from internvl_edge.runtime import ExportError

NORM2 = "vision_model.encoder.layers.0.norm2.weight"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
FC2 = "vision_model.encoder.layers.0.mlp.fc2.weight"
FFN_NORM = "language_model.model.layers.1.ffn_norm.weight"
W1 = "language_model.model.layers.1.feed_forward.w1.weight"
W2 = "language_model.model.layers.1.feed_forward.w2.weight"
WQKV = "language_model.model.layers.0.attention.wqkv.weight"
WO = "language_model.model.layers.0.attention.wo.weight"
HALF: dict[str, Any] = {"vision": "fp16", "language": "fp16"}
DIALECTS = ("tensorrt", "tensorrt-portable")
#: Values of the loud layers reach some 2e6, their weights 4e4: only the values overflow.
LOUD = 6e4


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


def scaled_checkpoint(folder: Path, factors: Mapping[str, float]) -> Path:
    """A random checkpoint some of whose matrices are multiplied."""
    checkpoint = write_checkpoint(folder, small_config(), dtype=np.dtype(np.float32))
    file = checkpoint / "model.safetensors"
    state = load_file(file)
    for name, factor in factors.items():
        state[name] = state[name] * np.float32(factor)
    save_file(state, file)
    return checkpoint


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inner values of one MLP in each part are far too large, and divided out again."""
    folder = tmp_path_factory.mktemp("loud") / "checkpoint"
    raised = {NORM2: 10, FC1: LOUD, FFN_NORM: 10, W1: LOUD}
    return scaled_checkpoint(folder, raised | {FC2: 0.1 / LOUD, W2: 0.01 / LOUD})


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, loud: Path) -> Path:
    """The loud checkpoint in float32, for ONNX Runtime."""
    return export_bundle(loud, tmp_path_factory.mktemp("exact") / "bundle")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_overflowing_layers_are_found_and_kept_in_float32(
    tmp_path: Path, loud: Path, exact: Path, dialect: Any
) -> None:
    bundle = export_bundle(loud, tmp_path / "bundle", dialect=dialect, **HALF)
    report = json.loads((bundle / QUANTISATION_REPORT).read_text(encoding="utf-8"))
    found = {(value["place"], value["weight"]) for value in report["outside_float16"]}
    assert found == {("output", FC1), ("input", FC2), ("output", W1), ("input", W2)}
    for sqnr in _against_float32(bundle, exact):
        assert sqnr > 45  # float16 has 73 dB for one rounding, and some layers round


@pytest.mark.parametrize("dialect", DIALECTS)
def test_without_the_analysis_they_overflow(
    tmp_path: Path, loud: Path, dialect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ONNX's own NumPy kernels, which round to float16 after every node."""
    exact = _evaluate(export_bundle(loud, tmp_path / "exact", dialect=dialect))
    guarded = _evaluate(export_bundle(loud, tmp_path / "guarded", dialect=dialect, **HALF))
    monkeypatch.setattr(
        "internvl_edge.export.calibration.decisions.wide_linears", lambda _: frozenset()
    )
    bare = _evaluate(export_bundle(loud, tmp_path / "bare", dialect=dialect, **HALF))
    for expected, good, bad in zip(exact, guarded, bare, strict=True):
        assert _sqnr(expected, good) > 45
        assert not np.isfinite(bad).all()


def _evaluate(bundle: Path) -> list[NDArray[np.float32]]:
    """Image embeddings of one tile, and logits of a prefill."""
    rows = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    return [embeddings_of_a_tile(bundle), logits_of_rows(bundle, rows)]


def test_a_quantised_export_keeps_the_same_layers_wide(
    tmp_path: Path, loud: Path, exact: Path
) -> None:
    options = QuantOptions(block=64)
    bundle = export_bundle(
        loud, tmp_path / "b", dialect="tensorrt", vision="int8", language="int8", options=options
    )
    assert min(_against_float32(bundle, exact)) > 25  # 8-bit rounding: 40 dB, some layers of it


def test_inspect_names_them(tmp_path: Path, loud: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = export_bundle(loud, tmp_path / "bundle", dialect="tensorrt", **HALF)
    assert main(["inspect", str(bundle), "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept_fp32"]
    assert set(kept) == {FC1, FC2, W1, W2}
    assert "overflows" in kept[FC1]
    for damaged in ("", "[]", '{"outside_float16": [{}]}'):
        (bundle / QUANTISATION_REPORT).write_text(damaged)
        assert main(["inspect", str(bundle)]) == 2
        assert "export again" in capsys.readouterr().err


def test_values_too_small_are_found(tmp_path: Path) -> None:
    checkpoint = scaled_checkpoint(tmp_path / "checkpoint", {WQKV: 1e-6})
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dialect="tensorrt", **HALF)
    report = json.loads((bundle / QUANTISATION_REPORT).read_text(encoding="utf-8"))
    found = {(value["place"], value["weight"]) for value in report["outside_float16"]}
    assert ("output", WQKV) in found
    assert ("input", WO) in found


def test_an_ordinary_model_is_left_alone(tmp_path: Path) -> None:
    checkpoint = scaled_checkpoint(tmp_path / "checkpoint", {})
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dialect="tensorrt", **HALF)
    report = json.loads((bundle / QUANTISATION_REPORT).read_text(encoding="utf-8"))
    assert report["outside_float16"] == []


def test_attention_that_overflows_is_refused(tmp_path: Path) -> None:
    """Cached values have float16; nothing after them can help."""
    checkpoint = scaled_checkpoint(tmp_path / "checkpoint", {WQKV: LOUD})
    with pytest.raises(ExportError, match=r"attention in front of .*wo.weight reaches .*fp32"):
        export_bundle(checkpoint, tmp_path / "bundle", dialect="tensorrt", **HALF)
    assert not (tmp_path / "bundle").exists()
    recipe = Recipe("fp16", "fp16", "fp16", dialect="tensorrt")
    source = SyntheticWeights(parse_config(small_config()))
    check_ranges([ValueRange("input", WO, 6e4, 70)], recipe, source)  # only near the end: goes on


@settings(max_examples=40, deadline=None)
@given(
    exponents=st.tuples(st.integers(-9, 6), st.integers(-9, 6)),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_probes_measure_what_numpy_does(
    tmp_path_factory: pytest.TempPathFactory, exponents: tuple[int, int], rows: int, seed: int
) -> None:
    """Two runs of different size through a graph of probes alone."""
    random = np.random.default_rng(seed)
    runs = [
        (random.standard_normal((rows, 7)) * 10.0**power).astype(np.float32) for power in exponents
    ]
    (value,) = _measure(tmp_path_factory.mktemp("probe"), runs)
    everything = np.concatenate(runs)
    with np.errstate(over="ignore"):
        error = everything - everything.astype(np.float16).astype(np.float32)
    wide, noise = everything.astype(np.float64), error.astype(np.float64)
    assert value.largest == np.abs(everything).max()
    expected = sqnr_db(float((wide**2).sum()), float((noise**2).sum()))
    if np.isfinite(expected) and (noise**2).sum() > 1e-30:  # beyond float32 sums of squares
        assert value.sqnr_db == pytest.approx(expected, abs=0.01)
    assert value.fits_float16 == (value.largest <= LARGEST and value.sqnr_db >= 50)


def _measure(folder: Path, runs: list[NDArray[np.float32]]) -> list[ValueRange]:
    import onnxruntime as ort

    graph = GraphBuilder("probes")
    probes = RangeProbes(graph)
    probes.norm("norm.weight", graph.input(Tensor("x", "float32", ("rows", 7))))
    names = probes.expose()
    graph.save(folder, lambda _: None)
    session = ort.InferenceSession(folder / "probes.onnx", providers=["CPUExecutionProvider"])
    collector = RangeCollector()
    for x in runs:
        for name, measured in zip(names, session.run(names, {"x": x}), strict=True):
            collector.add(name, measured)
    values = list(collector.values())
    decisions = collector.decisions()
    assert ranges_of(decisions) == [value for value in values if not value.fits_float16]
    assert wide_linears(decisions) == frozenset()  # no linear layer, only a norm
    return values


def _against_float32(bundle: Path, exact: Path) -> list[float]:
    """SQNR of image embeddings, prefill and decode to a float32 bundle's, the same image rows."""
    expected = run_bundle(exact)
    got = run_bundle(bundle, expected.rows)
    return [_sqnr(a, b) for a, b in zip(vars(expected).values(), vars(got).values(), strict=True)]


def _sqnr(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    wide = expected.astype(np.float64)
    return sqnr_db(float((wide**2).sum()), float(((got - wide) ** 2).sum()))


@pytest.mark.parametrize(
    ("wanted", "probed"),
    [
        ({"vision": "int8", "language": "int4"}, False),
        ({"vision": "int8", "language": "int8", "kv": "int8"}, False),
        ({"vision": "int8", "language": "fp16"}, True),
        ({"vision": "int8", "kv": "fp16"}, True),
        ({"vision": "int8", "dialect": "tensorrt"}, True),
    ],
    ids=str,
)
def test_nobody_looks_where_nothing_is_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], probed: bool
) -> None:
    """Probes copied every value four times, of exports that asked nothing of them."""
    measured: list[str] = []

    def measure(probes: RangeProbes, name: str, value: str) -> str:
        measured.append(name)
        return real(probes, name, value)

    real = RangeProbes._measure
    monkeypatch.setattr(RangeProbes, "_measure", measure)
    export_bundle(
        scaled_checkpoint(tmp_path / "checkpoint", {}),
        tmp_path / "bundle",
        options=QuantOptions(block=32),
        sensitivity=False,
        **wanted,
    )
    assert bool(measured) == probed
