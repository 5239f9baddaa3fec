"""What quantisation costs, unit by unit: measured rightly, stored, drawn, and acted upon."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnxruntime as ort
import pytest
import torch
from checkpoints import KV8, small_config, write_checkpoint
from numpy.typing import NDArray
from torch.nn.functional import kl_div, log_softmax

from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bundle.contract import QUANTISATION_PLOT, QUANTISATION_REPORT, stored_name
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.token_files import tokenizer_files
from internvl_edge.cli.main import main
from internvl_edge.export import writer
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration import sensitivity
from internvl_edge.export.calibration.calibrate import Sample
from internvl_edge.export.calibration.decisions import Decisions, QuantOptions, Recipe, make_plan
from internvl_edge.export.calibration.observe import HERE
from internvl_edge.export.calibration.plot import KEPT, QUANTISED, cost_plot
from internvl_edge.export.calibration.report import (
    UnitCost,
    most_sensitive,
    render_report,
    tensor_prefix,
)
from internvl_edge.export.calibration.run import calibrate, load_calibration
from internvl_edge.export.calibration.sensitivity import chosen_samples, divergence, multiply_adds
from internvl_edge.export.calibration.units import HEAD_ROWS
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.names import NORM
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.output.workspace import Workspace
from internvl_edge.runtime import DeviceError, ExportError, InternVL, OptionsError

pytestmark = pytest.mark.slow(seconds=1)

BLOCK32 = QuantOptions(block=32)
ALL = {"vision": "int8", "language": "int4", "options": BLOCK32, **KV8}
RECIPE = Recipe("int8", "int4", "fp32", BLOCK32)
UNITS = ["vision.0", "vision.1", "projector", "language.0", "language.1", "head"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "checkpoint"
    return write_checkpoint(folder, small_config(hidden=64, vision_hidden=64))


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 4)


@dataclass(frozen=True)
class Calibrated:
    """What calibration decided, and the data as the model saw it."""

    decisions: Decisions
    samples: Sequence[Sample]


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path) -> Calibrated:
    source = Checkpoint(checkpoint)
    workspace = Workspace(checkpoint.parent / "run", "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_run, "DEFAULT_ITEMS", 4)
        data = load_calibration(source, None)
    decisions = calibrate(source, RECIPE, data, workspace, HERE, lambda _: lambda _: None)
    return Calibrated(decisions, data.samples)


def read_report(bundle: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((bundle / QUANTISATION_REPORT).read_text())
    return report


def kl(exact: NDArray[Any], got: NDArray[Any]) -> float:
    """PyTorch's, in float64, mean over rows."""
    p, q = (log_softmax(torch.from_numpy(x).double(), -1) for x in (exact, got))
    return float(kl_div(q, p, log_target=True, reduction="batchmean"))


def test_divergence_is_pytorchs() -> None:
    random = np.random.default_rng(0)
    exact = random.standard_normal((7, 300)).astype(np.float32) * 5
    got = exact + random.standard_normal((7, 300)).astype(np.float32) * 0.3
    assert divergence(exact, got) == pytest.approx(kl(exact, got), rel=1e-9)
    assert divergence(exact, exact) == 0


@pytest.mark.parametrize("unit", UNITS)
def test_a_units_divergence_is_that_of_a_bundle_with_only_it_quantised(
    tmp_path: Path,
    checkpoint: Path,
    calibrated: Calibrated,
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
) -> None:
    """Two bundles through the runtime, judged by PyTorch, against what the report says."""
    whole = make_plan(RECIPE, calibrated.decisions)
    prefixes = (tensor_prefix(unit), *([stored_name(NORM)] if unit == "head" else []))
    only = QuantPlan(
        *(
            {name: v for name, v in part.items() if stored_name(name).startswith(prefixes)}
            for part in (whole.linears, whole.row_factors, whole.column_factors)
        )
    )
    source = Checkpoint(checkpoint)
    monkeypatch.setattr(Recipe, "embedding", "fp32")  # the table is no unit
    logits = []
    for name, plan in (("float", QuantPlan()), ("one", only)):
        monkeypatch.setattr(writer, "make_plan", lambda *_, plan=plan: plan)
        files = list(tokenizer_files(checkpoint))
        writer.write_bundle(source, tmp_path / name, RECIPE, {}, tokenizer=files)
        model = InternVL.load(tmp_path / name, device="cpu", threads=1)
        logits.append([_last_rows(model, sample) for sample in calibrated.samples])
    expected = kl(*(np.concatenate(rows) for rows in logits))
    # Float sums in another order move a few values across a rounding step.
    assert float(calibrated.decisions[f"divergence:{unit}"]) == pytest.approx(expected, rel=0.05)


def _last_rows(model: InternVL, sample: Sample) -> NDArray[np.float32]:
    return model.logits_of_tiles(sample.ids.tolist(), sample.tiles)[-HEAD_ROWS:]


def test_sensitivity_is_bounded(
    checkpoint: Path, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By work: the 26B must be asked for; by memory: the sequences that fit, or one tile."""
    small, samples = Checkpoint(checkpoint).spec, calibrated.samples
    assert multiply_adds(small, samples) < sensitivity.AFFORDABLE
    assert multiply_adds(internvl_1_5(), samples[:1]) > sensitivity.AFFORDABLE
    context = int(json.loads((checkpoint / "added_tokens.json").read_text())["<IMG_CONTEXT>"])
    assert chosen_samples(small, samples, context) == list(samples)
    monkeypatch.setattr(sensitivity, "MOST_BYTES", 1)
    (smallest,) = chosen_samples(small, samples, context)
    assert len(smallest.tiles) == 1
    assert (smallest.ids == context).sum() == small.vision.tokens_per_tile
    shortest = min(samples, key=lambda sample: len(sample.ids))
    np.testing.assert_array_equal(smallest.tiles[0], shortest.tiles[-1])
    rest = [ids[ids != context] for ids in (smallest.ids, shortest.ids)]
    np.testing.assert_array_equal(*rest)


def test_what_is_too_much_work_is_left_out(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_run, "AFFORDABLE", 0)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", vision="int8")
    assert {cost["divergence"] for cost in read_report(bundle)["units"]} == {None}
    assert render_report(bundle).splitlines()[1].endswith(" -")
    assert "KL divergence" not in (bundle / QUANTISATION_PLOT).read_text()
    asked = ["export", str(checkpoint), "-o", str(tmp_path / "asked"), "--vision", "int8"]
    assert main([*asked, "--sensitivity"]) == 0
    found = {cost["unit"]: cost["divergence"] for cost in read_report(tmp_path / "asked")["units"]}
    assert set(found) == {"vision.0", "vision.1", "projector"}
    assert min(found.values()) > 0


def test_the_plot_shows_every_unit(tmp_path: Path, checkpoint: Path) -> None:
    options = replace(BLOCK32, keep_worst=1)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", **{**ALL, "options": options})
    assert QUANTISATION_PLOT in open_bundle(bundle).manifest.files  # its hash was compared
    svg = ElementTree.parse(bundle / QUANTISATION_PLOT).getroot()
    assert [element.text for element in svg if element.text in UNITS] == UNITS
    bars = [element for element in svg if element.get("fill") in (QUANTISED, KEPT)]
    costs = read_report(bundle)["units"]
    widths = [float(bar.get("width") or 0) for bar in bars]
    left, right = widths[: len(UNITS)], widths[len(UNITS) :]
    for drawn, measure in ((left, "sqnr_db"), (right, "divergence")):
        values = [cost[measure] for cost in costs]
        assert np.argsort(drawn).tolist() == np.argsort(values).tolist()
    assert sum(bar.get("fill") == KEPT for bar in bars) == 2  # one unit, in both panels


def test_a_plot_of_extremes_is_well_formed() -> None:
    costs = [UnitCost(f"vision.{i}", 0.0, 1.0, 0.0, {}) for i in range(2)]
    for drawn in ([], costs, [replace(costs[0], sqnr_db=-3.0, divergence=1e-30), costs[1]]):
        svg = ElementTree.fromstring(cost_plot(drawn, ()))
        for bar in svg.iter("{http://www.w3.org/2000/svg}rect"):
            assert float(bar.get("width") or "nan") >= 0


def test_most_sensitive_is_by_divergence_where_it_is_known() -> None:
    costs = [UnitCost("projector", 20.0, 1.0, 1e-4, {}), UnitCost("head", 30.0, 1.0, 1e-2, {})]
    assert most_sensitive(costs, 1) == (tensor_prefix("head"),)
    assert most_sensitive([replace(costs[0], divergence=None), costs[1]], 1) == ("mlp1.",)


def test_a_calibration_device_that_is_absent_is_refused(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    target = tmp_path / "bundle"
    words = ["export", str(checkpoint), "-o", str(target), "--vision", "int8"]
    assert main([*words, "--calibration-device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "CUDAExecutionProvider" in error
    assert "internvl-edge[gpu]" in error
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_device_that_falls_back_is_refused(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime without a driver lists CUDA, warns, and runs on the CPU."""
    sessions = StandIn(monkeypatch, started=False)
    with pytest.raises(DeviceError, match="did not start"):
        export_bundle(checkpoint, tmp_path / "out", vision="int8", calibration_device="cuda")
    assert sessions.asked == [["CUDAExecutionProvider", "CPUExecutionProvider"]]
    assert not (tmp_path / "out").exists()


def test_a_calibration_device_that_raises_is_refused(
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What ONNX Runtime prints when it falls back must not be in a program's output."""
    StandIn(monkeypatch, started=True)

    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("CUDA failure 35: driver\nis insufficient")

    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(DeviceError, match=r"did not start \(CUDA failure 35: driver is insuff"):
        export_bundle(checkpoint, tmp_path / "out", vision="int8", calibration_device="cuda")
    assert capfd.readouterr().out == ""


def test_the_calibration_device_reaches_the_float_units_only(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = export_bundle(checkpoint, tmp_path / "cpu", **ALL)
    sessions = StandIn(monkeypatch, started=True)
    bundle = export_bundle(checkpoint, tmp_path / "cuda", **ALL, calibration_device="cuda")
    asked = [providers[0] for providers in sessions.asked]
    # Calibration and divergence run every unit in float; embedding is never quantised.
    assert asked.count("CUDAExecutionProvider") == 2 * (len(UNITS) + 1)
    assert asked.count("CPUExecutionProvider") == 2 * len(UNITS)
    assert (bundle / "language.data").read_bytes() == (plain / "language.data").read_bytes()


@pytest.mark.gpu
def test_calibration_on_a_gpu_finds_what_the_cpu_finds(tmp_path: Path, checkpoint: Path) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu and a GPU")
    found = {}
    for device in ("cpu", "cuda"):
        bundle = export_bundle(checkpoint, tmp_path / device, calibration_device=device, **ALL)
        found[device] = read_report(bundle)["units"]
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        # Sums in another order, and in TF32 where the provider takes it.
        assert cuda["sqnr_db"] == pytest.approx(cpu["sqnr_db"], abs=1.0)


class StandIn:
    """In the place of ONNX Runtime's CUDA provider: runs on the CPU, and says what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, started: bool) -> None:
        self.asked: list[list[str]] = []
        real = ort.InferenceSession

        class Session:
            def __init__(
                inner, graph: str, options: Any, providers: list[str], enable_fallback: bool
            ) -> None:
                assert not enable_fallback  # it would print, to stdout
                self.asked.append(providers)
                inner.providers = providers if started else providers[-1:]
                inner.session = real(graph, options, providers=["CPUExecutionProvider"])

            def get_providers(inner) -> list[str]:
                return inner.providers

            def __getattr__(inner, name: str) -> Any:
                return getattr(inner.session, name)

        both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(ort, "InferenceSession", Session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: both)


def test_the_report_names_what_a_unit_costs_and_keeps_the_worst(
    tmp_path: Path, checkpoint: Path
) -> None:
    whole = export_bundle(checkpoint, tmp_path / "whole", **ALL)
    report = json.loads((whole / QUANTISATION_REPORT).read_text())
    units = {cost["unit"]: cost["divergence"] for cost in report["units"]}
    layers = [f"{part}.{layer}" for part in ("vision", "language") for layer in (0, 1)]
    assert set(units) == {*layers, "projector", "head"}
    assert report["calibration"]["items"] == 4
    options = QuantOptions(block=32, keep_worst=1)
    kept = export_bundle(checkpoint, tmp_path / "kept", **{**ALL, "options": options})
    stored = json.loads((kept / QUANTISATION_REPORT).read_text())["kept_fp16"]
    assert stored == [tensor_prefix(max(units, key=lambda unit: units[unit]))]
    assert "kept fp16" in render_report(kept)
    sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in (whole, kept)]
    assert sizes[1] > sizes[0]


def test_a_budget_keeps_as_many_units_as_it_takes(tmp_path: Path, checkpoint: Path) -> None:
    kept = {}
    for budget in (1.0, 3e-3, 1e-4):
        bundle = export_bundle(
            checkpoint, tmp_path / str(budget), vision="int8", language="int4", budget=budget
        )
        report = json.loads((bundle / QUANTISATION_REPORT).read_text())
        kept[budget] = len(report["kept_fp16"])
    assert 0 == kept[1.0] <= kept[3e-3] <= kept[1e-4]
    assert kept[1e-4] > 0
    with pytest.raises(ExportError, match="cannot be met"):
        export_bundle(checkpoint, tmp_path / "none", vision="int8", language="int4", budget=1e-12)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"budget": float("nan")}, "budget is nan, it must be above 0"),
        ({"budget": -1.0}, "budget is -1.0, it must be above 0"),
        (
            {"options": QuantOptions(keep_fp16=("vision.",))},
            "keep_fp16 has 'vision.', which no name",
        ),
        (
            {"options": QuantOptions(keep_fp16=("mlp1.", ""))},
            "keep_fp16 has '', which no name begins",
        ),
    ],
    ids=["no number", "negative", "a typing error", "empty"],
)
def test_what_keeps_nothing_is_refused_before_calibration(
    tmp_path: Path, checkpoint: Path, asked: dict[str, Any], says: str
) -> None:
    """Of a large model that takes hours, and a prefix of no name kept nothing without a word."""
    units: list[int] = []

    def count(total: int) -> Callable[[int], None]:
        return units.append

    with pytest.raises(OptionsError, match=f"^{re.escape(says)}"):
        export_bundle(
            checkpoint, tmp_path / "none", language="int4", calibration_progress=count, **asked
        )
    assert units == []
