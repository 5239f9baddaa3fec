"""The gate: every precision passes it, and it catches what TensorRT would get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from builder import needs_builder, needs_newest
from calibrating import few_items
from checkpoints import small_config, write_checkpoint
from onnx import TensorProto, helper

from internvl_edge.bench.gpu.engines import DEPTHS, build_layers, extrapolate, true_width
from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.graphs.dialects.tensorrt_modern import ModernDialect, Step
from internvl_edge.export.graphs.graph import ALIGNMENT, GraphBuilder
from internvl_edge.export.tensorrt.builder import ShapeRange
from internvl_edge.export.tensorrt.gate import (
    EngineShapes,
    GateReport,
    GraphReport,
    broken_rules,
    check_bundle,
    profile_of,
    render_gate,
)
from internvl_edge.export.tensorrt.rtx import CAPABILITIES
from internvl_edge.runtime import BundleError

#: Small, so that building is quick; the shapes of real engines are the default's business.
SHAPES = EngineShapes(context=256, tokens=64)
DIALECTS: tuple[DialectName, ...] = ("tensorrt", "tensorrt-portable")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"vision": "fp16", "language": "fp16"},
    "int8": {"vision": "int8", "language": "int8"},
    "int4": {"vision": "int8", "language": "int4"},
}

pytestmark = needs_builder

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, two layers a part, wide enough for blocks of 64."""
    config = small_config(hidden=128, vision_hidden=128)
    config["llm_config"]["vocab_size"] = 513  # odd, as InternLM2's
    return write_checkpoint(tmp_path_factory.mktemp("gate") / "checkpoint", config)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Export:
    """The checkpoint in a dialect and precision, written when first asked for."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(dialect: DialectName, precision: str) -> Path:
        path = folder / f"{dialect}-{precision}"
        if not path.exists():
            with few_items():
                export_bundle(
                    checkpoint,
                    path,
                    dialect=dialect,
                    options=QuantOptions(block=64),
                    sensitivity=False,
                    **PRECISIONS[precision],
                )
        return path

    return bundle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "precision"),
    [
        pytest.param(dialect, precision, marks=[needs_newest] if dialect == "tensorrt" else [])
        for precision in PRECISIONS
        for dialect in DIALECTS
    ],
)
def test_every_precision_passes(exported: Export, dialect: DialectName, precision: str) -> None:
    path = exported(dialect, precision)
    reference = exported("onnxruntime", precision)
    report = check_bundle(path, reference=reference, shapes=SHAPES)
    assert report.failures == []
    assert len(report.comparisons) == 5
    assert render_gate(report).endswith("\npasses")
    _check_products(report, precision)
    manifest = open_bundle(path, verify="size").manifest
    for graph in report.graphs:
        stored = manifest.files[graph.graph.replace(".onnx", ".data")].bytes
        # The file is padded to pages, and small constants lie in the graph.
        assert stored * 0.7 < graph.expected_bytes < stored + ALIGNMENT
        assert graph.weight_bytes < graph.plan_bytes
        assert graph.apart == []


def _check_products(report: GateReport, precision: str) -> None:
    """Counted from the architecture: nothing is lost, and integers are integers."""
    spec = open_bundle(Path(report.path), verify="size").spec
    vision, language = (dict(graph.products) for graph in report.graphs)
    towers = 4 * spec.vision.layers_run + 2  # and the patch embedding
    decoder = 5 * spec.language.num_hidden_layers  # and the head
    float_type = "fp32" if precision == "fp32" else "fp16"
    attentions = {key: count for key, count in vision.items() if key.startswith("attention")}
    assert set(attentions) == {f"attention {float_type}"}
    expected = {
        "fp32": ({"fp32 x fp32": towers + 1}, {"fp32 x fp32": decoder + 1}),
        "fp16": ({"fp16 x fp16": towers + 1}, {"fp16 x fp16": decoder + 1}),
        "int8": ({"int8 x int8": towers, "fp16 x fp16": 1}, {"fp16 x int8": decoder + 1}),
        "int4": (
            {"int8 x int8": towers, "fp16 x fp16": 1},
            {"fp16 x int4": decoder, "fp16 x int8": 1},
        ),
    }[precision]
    for got, wanted in zip((vision, language), expected, strict=True):
        products = {key: n for key, n in got.items() if not key.startswith("attention")}
        assert products == wanted


@pytest.mark.slow
@needs_newest
def test_it_builds_for_every_gpu(exported: Export) -> None:
    report = check_bundle(
        exported("tensorrt", "fp16"), capabilities=CAPABILITIES, shapes=replace(SHAPES, tokens=16)
    )
    assert report.failures == []
    assert [graph.capability for graph in report.graphs] == [*CAPABILITIES, *CAPABILITIES]
    assert [item.name for item in report.comparisons] == [
        "decode against one prefill",
        "decode beside another",
    ]


@pytest.mark.slow(seconds=2)
@needs_newest
def test_a_causal_flag_without_mask_fails_the_decode_step(
    tmp_path: Path, checkpoint: Path, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: it builds, and a prefill is right, but a step sees other keys than it should."""

    class Trapped(ModernDialect):
        def masked_attention(self, qkv: Sequence[str], step: Step, name: str) -> str:
            return self.graph.node("Attention", list(qkv), name, {"is_causal": 1})

    def trapped(_: DialectName, graph: str, plan: QuantPlan, dtype: str) -> ModernDialect:
        return Trapped(GraphBuilder(graph), plan, dtype)

    monkeypatch.setattr("internvl_edge.export.writer.new_dialect", trapped)
    path = export_bundle(checkpoint, tmp_path / "bundle", dialect="tensorrt")
    monkeypatch.undo()
    report = check_bundle(path, reference=exported("onnxruntime", "fp32"), shapes=SHAPES)
    assert {graph.graph for graph in report.graphs if not graph.failures} == {
        "vision.onnx",
        "language.onnx",
    }  # TensorRT has nothing against it
    comparisons = {item.name: item for item in report.comparisons}
    assert not comparisons["decode against one prefill"].holds
    assert not comparisons["decode logits"].holds
    assert comparisons["image embeddings"].holds
    assert any("is_causal=1" in rule for rule in report.broken)
    assert any("decode logits" in failure for failure in report.failures)


RIGHT = GraphReport(
    graph="language.onnx",
    capability=80,
    parsed_layers=1,
    engine_layers=1,
    products={},
    widened=[],
    apart=[],
    expected_bytes=10_000_000,
    weight_bytes=10_400_000,
    plan_bytes=11_000_000,
    scratch_bytes=0,
    peak_bytes=None,
    seconds=0.0,
)


def test_weights_stored_twice_fail() -> None:
    assert RIGHT.failures == []
    (failure,) = replace(RIGHT, weight_bytes=20_000_000).failures
    assert failure == "language.onnx, GPU 80: weights take 2.00 times their bytes in the file"
    (failure,) = replace(RIGHT, widened=["/w1"]).failures
    assert "/w1 is wider than in the graph" in failure


def test_other_dialects_and_references_are_refused(
    golden_bundle: Path, exported: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--check", str(golden_bundle)]) == 2
    assert "export --for tensorrt or export --for tensorrt-portable" in capsys.readouterr().err
    assert main(["inspect", "--all-gpus", str(golden_bundle)]) == 2
    assert "add --check" in capsys.readouterr().err
    portable = exported("tensorrt-portable", "fp32")
    with pytest.raises(BundleError, match="another model"):
        check_bundle(portable, reference=golden_bundle)
    with pytest.raises(BundleError, match="with dialect='onnxruntime'"):
        check_bundle(portable, reference=portable)


@pytest.mark.slow(seconds=2)
def test_the_command_prints_and_tells_by_its_status(
    exported: Export, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(exported("tensorrt-portable", "fp32"))
    assert main(["inspect", "--check", path]) == 0
    assert capsys.readouterr().out.endswith("\npasses\n")
    twice = replace(RIGHT, weight_bytes=2 * RIGHT.weight_bytes)
    monkeypatch.setattr("internvl_edge.export.tensorrt.gate.build_graph", lambda *_: twice)
    assert main(["inspect", "--check", path, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert "times their bytes" in report["failures"][0]


def test_rules_are_about_attention_with_a_cache() -> None:
    def attention(name: str, inputs: Sequence[str], **attributes: int) -> onnx.NodeProto:
        return helper.make_node("Attention", list(inputs), ["y"], name=name, **attributes)

    nodes = [
        attention("good", ["q", "k", "v", "mask"], is_causal=0),
        attention("trap", ["q", "k", "v"], is_causal=1),
        attention("ignored", ["q", "k", "v", "mask", "", "", "lengths"]),
    ]
    broken = broken_rules(helper.make_graph(nodes, "graph", [], []))
    assert [rule.split(":")[0] for rule in broken] == ["trap", "ignored"]


def test_profiles_cover_one_row_to_the_largest() -> None:
    inputs = [
        helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"]),
        helper.make_tensor_value_info("cache", TensorProto.FLOAT16, [1, 2, 96, 8]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["tokens", 64]),
        helper.make_tensor_value_info("keys", TensorProto.INT64, ["keys"]),
        helper.make_tensor_value_info("places", TensorProto.INT64, ["sequences", "each"]),
    ]
    graph = helper.make_graph([], "graph", inputs, [])
    profile = profile_of(graph, EngineShapes(context=96, tokens=512, rows=4, sequences=3))
    assert profile == {
        "rows": ShapeRange((1,), (1,), (4,)),
        "x": ShapeRange((1, 64), (1, 64), (96, 64)),  # no more than the cache holds
        "keys": ShapeRange((1,), (96,), (96,)),
        "places": ShapeRange((1, 1), (1, 1), (3, 96)),
    }


@pytest.mark.slow(seconds=60)
@needs_newest
def test_true_width(tmp_path: Path) -> None:
    """One and two layers of InternVL 1.5, INT8 vision and INT4 decoder (about a minute)."""
    small, large = (build_layers(layers, tmp_path) for layers in DEPTHS)
    for graph in (*small, *large):
        assert graph.failures == []
        # The plan is the weights and at most a few MiB of kernels.
        assert graph.plan_bytes == pytest.approx(graph.expected_bytes, rel=0.05)
        assert graph.peak_bytes is None or graph.peak_bytes < 2.6 * graph.plan_bytes
    for layers, (vision, language) in zip(DEPTHS, (small, large), strict=True):
        assert vision.products["int8 x int8"] == 4 * layers + 2
        assert language.products["fp16 x int4"] == 5 * layers
        assert language.products["fp16 x int8"] == 1
        assert language.apart == []
    spec = true_width()
    whole = extrapolate(small, large)
    # InternLM2-20B at 4.125 bits a weight and an 8-bit head; InternViT-6B and projector at 8 bits.
    mlp = 3 * spec.language.hidden_size * spec.language.intermediate_size
    attention = spec.language.hidden_size * (
        2 * spec.language.query_size + 2 * spec.language.key_value_size
    )
    head = spec.language.vocab_size * spec.language.hidden_size
    assert whole[1].file_bytes == pytest.approx(48 * (mlp + attention) * 4.125 / 8 + head, rel=0.02)
    assert whole[0].file_bytes == pytest.approx(5.67e9, rel=0.05)
