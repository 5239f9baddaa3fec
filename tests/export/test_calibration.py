"""Calibrated export: answers stay close, runs resume, and integer kernels really run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from checkpoints import GOLDEN, KV8, small_config, write_checkpoint
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.calib_data.generator import generate
from internvl_edge.calib_data.items import CalibrationDataError, load_items
from internvl_edge.export import bundle as bundle_module
from internvl_edge.export import writer
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import QuantOptions, record
from internvl_edge.export.calibration.gptq import error_factors, gptq_blocks, moments
from internvl_edge.export.calibration.groups import (
    head_groups,
    language_groups,
    projector_groups,
    vision_groups,
)
from internvl_edge.export.calibration.samples import DEFAULT_ITEMS
from internvl_edge.export.calibration.search import InputStats, full_scale, search
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import (
    BlockFormat,
    dequantize_blocks,
    quantize_blocks,
    quantize_channels,
)
from internvl_edge.runtime import ExportError, InternVL, LeftoverWarning
from internvl_edge.runtime.backends.products import use_exact_products

pytestmark = pytest.mark.slow(seconds=1)

BLOCK32 = QuantOptions(block=32)
ALL = {"vision": "int8", "language": "int4", "options": BLOCK32, **KV8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "checkpoint"
    return write_checkpoint(folder, small_config(hidden=64, vision_hidden=64))


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 4)


def decibels(signal: NDArray[Any], noisy: NDArray[Any]) -> float:
    """Signal to quantisation noise ratio."""
    return float(10 * np.log10((signal**2).sum() / ((noisy - signal) ** 2).sum()))


@pytest.mark.parametrize(
    ("precision", "rows_floor", "logits_floor"),
    [
        # An 8-bit rounding is about 40 dB below a normal signal, a 4-bit one about 20; a handful
        # of them in a row costs up to 10 dB more.
        ({"vision": "int8"}, 30, 28),
        (KV8, 200, 35),
        ({"language": "int8", "options": BLOCK32}, 200, 30),
        ({"language": "int4", "options": BLOCK32}, 200, 15),
        ({"language": "int4", "options": QuantOptions(block=32, head_bits=4)}, 200, 12),
        ({"language": "fp16", **KV8}, 200, 35),
        (ALL, 30, 14),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_quantised_model_stays_close(
    tmp_path: Path,
    checkpoint: Path,
    precision: dict[str, Any],
    rows_floor: float,
    logits_floor: float,
) -> None:
    image = generate(3, seed=9)[2].image
    outputs = []
    for name, chosen in (("float", {}), ("quantised", precision)):
        bundle = export_bundle(checkpoint, tmp_path / name, **chosen)
        model = InternVL.load(bundle, device="cpu", threads=2)
        rows = model.encode_images([image])
        ids = [1, *[model.context_id] * len(rows), *range(20, 40)]
        outputs.append((rows, model.logits(ids, [image])))
    (rows, logits), (other_rows, other_logits) = outputs
    if "vision" in precision:
        assert decibels(rows, other_rows) > rows_floor
    else:
        np.testing.assert_allclose(other_rows, rows, rtol=0, atol=1e-5)
    assert decibels(logits, other_logits) > logits_floor


def test_integer_kernels_run_and_nothing_is_dequantised(tmp_path: Path, checkpoint: Path) -> None:
    """From the profile of the optimised graphs, not from what was written."""
    bundle = export_bundle(checkpoint, tmp_path / "bundle", **ALL)
    spec = open_bundle(bundle).spec
    vision = _profiled_operators(
        bundle / VISION_GRAPH, tmp_path, {"tiles": np.zeros((2, 56, 56, 3), np.uint8)}
    )
    # Six products a layer (query, key and value have one each), two in the projector; only the
    # patch embedding stays float.
    assert vision["QGemm"] == 6 * spec.vision.num_hidden_layers + 2
    assert vision.get("Gemm", 0) + vision.get("MatMul", 0) == 1
    language = ort.SessionOptions()
    use_exact_products(language)
    language.optimized_model_filepath = str(tmp_path / "language.optimised.onnx")
    ort.InferenceSession(bundle / LANGUAGE_GRAPH, language, providers=["CPUExecutionProvider"])
    import onnx

    graph = onnx.load(tmp_path / "language.optimised.onnx", load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == 5 * spec.language.num_hidden_layers + 1
    assert operators.count("GroupQueryAttention") == spec.language.num_hidden_layers
    for unwanted in ("Gemm", "MatMul", "DequantizeLinear"):
        assert unwanted not in operators
        assert unwanted == "Gemm" or unwanted not in vision


def test_an_interrupted_calibration_resumes(tmp_path: Path, checkpoint: Path) -> None:
    units: list[int] = []

    def stop_after_three(total: int) -> Any:
        def advance(count: int) -> None:
            units.append(count)
            if len(units) == 3:
                raise KeyboardInterrupt

        return advance

    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(LeftoverWarning, match="kept the calibration so far in .*resumed.work"),
    ):
        export_bundle(
            checkpoint, tmp_path / "resumed", calibration_progress=stop_after_three, **ALL
        )
    workspace = tmp_path / "resumed.work" / "calibration"
    finished = {path.name: path.stat().st_mtime_ns for path in workspace.iterdir() if path.is_dir()}
    assert set(finished) == {"embed", "vision.0", "vision.1"}
    kept: dict[str, int] = {}

    def look(total: int) -> Any:
        def advance(count: int) -> None:
            kept.update({name: (workspace / name).stat().st_mtime_ns for name in finished})

        return advance

    with pytest.warns(LeftoverWarning, match="going on with .*: 3 layers are done"):
        export_bundle(checkpoint, tmp_path / "resumed", calibration_progress=look, **ALL)
    assert kept == finished  # not computed again
    assert not workspace.parent.exists()
    export_bundle(checkpoint, tmp_path / "whole", **ALL)
    for name in ("vision.data", "language.data"):
        assert (tmp_path / "resumed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_kept_layers_are_half_precision(tmp_path: Path, checkpoint: Path) -> None:
    kept = "vision_model.encoder.layers.0."
    bundle = export_bundle(
        checkpoint, tmp_path / "bundle", vision="int8", options=QuantOptions(keep_fp16=(kept,))
    )
    operators = _profiled_operators(
        bundle / VISION_GRAPH, tmp_path, {"tiles": np.zeros((1, 56, 56, 3), np.uint8)}
    )
    assert operators["QGemm"] == 6 + 2  # one of two layers, and the projector


@pytest.mark.parametrize(
    ("dialect", "language", "kv", "taken"),
    [
        ("onnxruntime", "fp16", "fp32", "fp16 or int8"),
        ("tensorrt", "fp32", "fp16", "fp32"),
        ("tensorrt-portable", "int4", "fp32", "fp16 or int8"),
    ],
)
def test_a_float_cache_attention_does_not_take(
    tmp_path: Path, checkpoint: Path, dialect: Any, language: Any, kv: Any, taken: str
) -> None:
    with pytest.raises(ExportError, match=f"kv {kv} does not go with .*; use {taken}$"):
        export_bundle(checkpoint, tmp_path / "bundle", language=language, kv=kv, dialect=dialect)


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt-portable"])
def test_an_onnxruntime_without_int8_cache_is_named(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dialect: Any
) -> None:
    monkeypatch.setattr(bundle_module, "takes_int8_cache", lambda: False)
    with pytest.raises(ExportError, match=r"install onnxruntime 1\.27"):
        export_bundle(checkpoint, tmp_path / "bundle", kv="int8", dialect=dialect)


@pytest.mark.parametrize("magnitude", [20, 100])
@pytest.mark.parametrize("form", [None, BlockFormat(4, 128)], ids=["w8a8", "int4"])
def test_rescaling_tames_outlier_channels(magnitude: float, form: BlockFormat | None) -> None:
    """As InternViT-6B has them: a few input channels 20 to 100 times the rest."""
    random = np.random.default_rng(0)
    rows, columns = 400, 512
    x = random.standard_normal((2 * rows, columns)).astype(np.float32)
    x[:, random.choice(columns, 5, replace=False)] *= magnitude
    weight = (random.standard_normal((256, columns)) * columns**-0.5).astype(np.float32)
    seen, held_out = x[:rows], x[rows:]
    stats = InputStats(np.abs(seen).max(0), np.abs(seen).mean(0), (seen**2).mean(0), seen[:128])
    choice = search(stats, [weight], form)
    naive = _simulate(
        held_out, weight, form, np.ones(columns, np.float32), full_scale(stats.largest)
    )
    tamed = _simulate(held_out, weight, form, choice.factors, choice.input_scale)
    exact = held_out @ weight.T
    gain = decibels(exact, tamed) - decibels(exact, naive)
    assert gain > (10 if form is None else 3)


def test_gptq_beats_round_to_nearest_on_inputs_it_has_not_seen() -> None:
    random = np.random.default_rng(0)
    mix = random.standard_normal((192, 192)) * 0.3 + np.eye(192)
    x = (random.standard_normal((1200, 192)) @ mix).astype(np.float32)
    weight = random.standard_normal((96, 192)).astype(np.float32)
    seen, held_out = x[:800], x[800:]
    exact = held_out @ weight.T
    for form in (BlockFormat(4, 32), BlockFormat(4, 64, symmetric=False)):
        plain = dequantize_blocks(quantize_blocks(weight, form), form, 192)
        factors = error_factors(moments(seen), np.ones(192, np.float32))
        better = dequantize_blocks(gptq_blocks(weight, form, factors), form, 192)
        assert decibels(exact, held_out @ better.T) > decibels(exact, held_out @ plain.T) + 1.5


def test_gptq_without_correlation_is_round_to_nearest() -> None:
    """Independent inputs: nothing to compensate, so the two must agree."""
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    form = BlockFormat(4, 32)
    factors = error_factors([np.eye(64, dtype=np.float32)], np.ones(64, np.float32))
    ours, plain = gptq_blocks(weight, form, factors), quantize_blocks(weight, form)
    np.testing.assert_array_equal(ours.packed, plain.packed)


@pytest.mark.parametrize("rows", [1, 9])
def test_gptq_leaves_the_weight_as_it_was(rows: int) -> None:
    """One row is laid out like one column: a view of it would be written to."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, 100)).astype(np.float32)
    before = weight.copy()
    factors = error_factors(
        moments(random.standard_normal((300, 100)).astype(np.float32)), weight[0] ** 2 + 1
    )
    blocks = gptq_blocks(weight, BlockFormat(4, 64), factors)
    np.testing.assert_array_equal(weight, before)
    assert blocks.packed.shape == (rows, 2, 32)
    assert (blocks.packed[:, 1, 18:] == 0x88).all()  # padding stands for zero


def test_generator_is_deterministic_and_varied() -> None:
    first, again = generate(12), generate(12)
    assert [item.prompt for item in first] == [item.prompt for item in again]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(other.image))
    assert len({item.image.size for item in first}) >= 5
    assert any("图" in item.prompt for item in first)


def test_own_data_is_read_and_mistakes_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert [item.answer for item in load_items(tmp_path)] == [""]
    lines = [{"image": "a.png", "prompt": "Q", "answer": "A"}, {"image": "missing.png"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines[:1])))
    assert [item.prompt for item in load_items(tmp_path)] == ["Q"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CalibrationDataError, match=r"data\.jsonl:2"):
        load_items(tmp_path)
    with pytest.raises(CalibrationDataError, match="does not exist"):
        load_items(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationDataError, match="neither"):
        load_items(tmp_path / "empty")


def test_golden_embeddings_survive_int8(
    tmp_path: Path, golden_images: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture unlike anything calibrated with, by the default data: as good as full ranges."""
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", DEFAULT_ITEMS)
    floor: dict[bool, float] = {}
    image = golden_images["img0"]
    exact = InternVL.load(export_bundle(GOLDEN / "model", tmp_path / "float"), device="cpu")
    for naive in (True, False):
        bundle = export_bundle(
            GOLDEN / "model",
            tmp_path / f"naive-{naive}",
            vision="int8",
            options=QuantOptions(naive=naive),
        )
        rows = InternVL.load(bundle, device="cpu").encode_images([image], 6)
        floor[naive] = decibels(exact.encode_images([image], 6), rows)
    assert floor[True] > 25
    assert floor[False] > floor[True] - 1


def _simulate(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    form: BlockFormat | None,
    factors: NDArray[np.float32],
    input_scale: float,
) -> NDArray[np.float32]:
    """The layer's output as the integer kernels compute it, written out once more."""
    scaled = weight * factors
    if form is not None:
        blocks = quantize_blocks(scaled, form, ratios=(1.0,))
        return np.asarray((x / factors) @ dequantize_blocks(blocks, form, weight.shape[1]).T)
    values, scales = quantize_channels(scaled)
    steps = np.clip(np.rint(x / factors / input_scale), -128, 127)
    return np.asarray((steps @ values.T.astype(np.float32)) * scales * input_scale)


def _profiled_operators(
    graph: Path, folder: Path, feeds: dict[str, NDArray[Any]]
) -> dict[str, int]:
    """Operators that ran, by kind, from ONNX Runtime's profile of one run."""
    options = ort.SessionOptions()
    use_exact_products(options)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    counts: dict[str, int] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            counts[operator] = counts.get(operator, 0) + 1
    return counts


@pytest.mark.parametrize("vision_kind", ["6b", "300m"])
def test_factors_change_nothing_in_real_arithmetic(
    tmp_path: Path, vision_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every group rescaled at random and stored in float: the same answers."""
    config = small_config(vision_kind=vision_kind, heads=4, kv_heads=2)
    config["llm_config"]["bias"] = True
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
    source = Checkpoint(checkpoint)
    random = np.random.default_rng(0)
    decisions: dict[str, Any] = {}
    groups = [*projector_groups(), *head_groups()]
    for layer in range(2):
        groups += vision_groups(source.spec.vision, layer)
        groups += language_groups(source.spec.language, layer)
    for group in groups:
        columns = source.shape(group.linears[0])[1]
        runs, repeats = group.tie
        shared = random.uniform(0.2, 5, (runs, 1, columns // runs // repeats))
        factors = np.broadcast_to(shared, (runs, repeats, shared.shape[2])).reshape(-1)
        decisions |= record(group, np.ones(columns, np.float32), factors, source)
    plan = QuantPlan(
        {
            n[8:]: LinearPlan("float", input_factors=f)
            for n, f in decisions.items()
            if "factors:" in n
        },
        {n[4:]: f for n, f in decisions.items() if n.startswith("row:")},
        {n[7:]: f for n, f in decisions.items() if n.startswith("column:")},
    )
    image = generate(3, seed=9)[2].image
    outputs = []
    for name, chosen in (("plain", QuantPlan()), ("rescaled", plan)):
        monkeypatch.setattr(writer, "make_plan", lambda *_, chosen=chosen: chosen)
        model = InternVL.load(export_bundle(checkpoint, tmp_path / name), device="cpu")
        rows = model.encode_images([image])
        outputs.append((rows, model.logits([1, *[model.context_id] * len(rows), 9, 8], [image])))
    np.testing.assert_allclose(outputs[1][0], outputs[0][0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs[1][1], outputs[0][1], rtol=0, atol=1e-4)
