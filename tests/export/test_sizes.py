"""Bytes computed from the spec against what export plans and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import KV8, small_config, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bench.scale.synthetic import SyntheticWeights
from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.manifest import open_bundle, read_manifest
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import Decisions, QuantOptions, Recipe, make_plan
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.formats.plan import QuantPlan
from internvl_edge.export.sizes import OTHER, PARTS, bundle_bytes, part_entries, part_of
from internvl_edge.export.writer import Layout, plan_export

GB = 1e9
W8_W4 = Recipe("int8", "int4", "int8")


def uncalibrated(spec: ModelSpec) -> Decisions:
    """Decisions of the right shapes: every scale one, nothing rescaled."""
    decisions: Decisions = {}
    for name, shape in tensor_shapes(spec).items():
        if part_of(name) not in ("embedding", OTHER):
            decisions[f"scale:{name}"] = decisions[f"naive_scale:{name}"] = np.float32(1)
            decisions[f"square:{name}"] = np.ones(shape[1], np.float32)
    lanes = (spec.language.num_key_value_heads, spec.language.head_dim)
    for layer in range(spec.language.num_hidden_layers):
        for kind in ("key", "value", "naive_value"):
            decisions[f"{kind}:{layer}"] = np.ones(lanes, np.float32)
    return decisions


def planned(spec: ModelSpec, recipe: Recipe) -> tuple[Layout, QuantPlan]:
    """What an export would write, planned from weights that are never drawn."""
    plan = make_plan(recipe, uncalibrated(spec))
    return plan_export(SyntheticWeights(spec), recipe, plan), plan


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    vision_heads = draw(st.integers(1, 3))
    config = small_config(
        vision_kind=draw(st.sampled_from(["6b", "300m"])),
        hidden=heads * 16 * draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        vision_hidden=vision_heads * 16 * draw(st.integers(1, 3)),
        vision_heads=vision_heads,
        layers=draw(st.integers(1, 3)),
        vision_layers=(vision_layers := draw(st.integers(1, 3))),
        tile=28 * draw(st.integers(1, 3)),
        select_layer=draw(st.integers(-vision_layers, -1)),
    )
    config["llm_config"]["bias"] = draw(st.booleans())
    config["llm_config"]["vocab_size"] = draw(st.integers(10, 600))
    return parse_config(config)


def tensorrt_recipes() -> st.SearchStrategy[Recipe]:
    """What TensorRT takes: whole symmetric blocks, and int8 keys in the portable graphs only."""
    fields = {
        "vision": st.sampled_from(["fp32", "fp16", "int8"]),
        "language": st.sampled_from(["fp32", "fp16", "int8", "int4"]),
        "kv": st.sampled_from(["fp16", "int8"]),
        "dialect": st.just("tensorrt-portable"),
        "options": st.builds(QuantOptions, block=st.just(64), head_bits=st.sampled_from([4, 8])),
    }
    modern = fields | {"kv": st.just("fp16"), "dialect": st.just("tensorrt")}
    return st.builds(Recipe, **modern) | st.builds(Recipe, **fields)


RECIPES = st.builds(
    Recipe,
    vision=st.sampled_from(["fp32", "fp16", "int8"]),
    language=st.sampled_from(["fp32", "fp16", "int8", "int4"]),
    kv=st.sampled_from(["fp32", "int8"]),
    options=st.builds(
        QuantOptions,
        block=st.sampled_from([32, 64, 128, 256]),
        symmetric=st.booleans(),
        head_bits=st.sampled_from([4, 8]),
        keep_fp16=st.sampled_from(
            [(), ("vision_model.encoder.layers.0.", "mlp1."), ("language_model.model.layers.0.",)]
        ),
    ),
)


@settings(max_examples=60, deadline=None)
@given(spec=specs(), recipe=RECIPES)
def test_every_part_has_exactly_the_computed_bytes(spec: ModelSpec, recipe: Recipe) -> None:
    layout, plan = planned(spec, recipe)
    entries = part_entries(layout.weights, plan)
    assert {part: entry.bytes for part, entry in entries.items()} == bundle_bytes(spec, recipe)


@pytest.mark.parametrize("kind", ["6b", "300m"])
@settings(max_examples=30, deadline=None)
@given(recipe=tensorrt_recipes(), bias=st.booleans())
def test_matrices_have_exactly_the_computed_bytes_for_tensorrt(
    kind: str, recipe: Recipe, bias: bool
) -> None:
    config = small_config(vision_kind=kind, hidden=128, heads=4, kv_heads=2)
    config["llm_config"] |= {"bias": bias, "intermediate_size": 192}
    spec = parse_config(config)
    layout, plan = planned(spec, recipe)
    computed = bundle_bytes(spec, recipe)
    for part, entry in part_entries(layout.weights, plan).items():
        # Scales of the KV cache are stored as each attention wants them, once or twice.
        assert entry.bytes == pytest.approx(computed[part], rel=0.05 if part == OTHER else 0)


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt", "tensorrt-portable"])
@pytest.mark.parametrize("language", ["int8", "int4"])
@pytest.mark.parametrize("block", [64, 128])
def test_files_of_the_26b_are_the_computed_size(dialect: Any, language: Any, block: int) -> None:
    """InternVL 1.5 as it would be written, pages and all, from its spec alone."""
    spec = internvl_1_5()
    kv = "fp16" if dialect == "tensorrt" else "int8"
    recipe = Recipe("int8", language, kv, QuantOptions(block=block), dialect=dialect)
    layout, _ = planned(spec, recipe)
    computed = sum(bundle_bytes(spec, recipe).values())
    print(f"planned {layout.file_bytes / GB:.3f} GB, computed {computed / GB:.3f} GB")
    assert layout.file_bytes == pytest.approx(computed, rel=0.02)


def test_the_26b_by_hand() -> None:
    """The formula against arithmetic on the published sizes."""
    sizes = bundle_bytes(internvl_1_5(), W8_W4)
    vision = 45 * (4 * 3200 * 3200 + 2 * 3200 * 12800)
    per_row = 45 * (3 * 3200 + 3200 + 12800 + 3200) * 8  # a scale and a bias
    assert sizes["vision_linears"] == vision + per_row
    decoder = 48 * (6144 * (48 + 2 * 8) * 128 + 6144 * 6144 + 3 * 6144 * 16384)
    assert sizes["decoder_linears"] == decoder / 2 + decoder / 128 * 4
    assert sizes["head"] == 92553 * (6144 + 6144 / 128 * 4)
    assert sizes["embedding"] == sizes["head"]
    # 51 GB in bfloat16: what the issue of fitting an Orin is about.
    assert sum(bundle_bytes(internvl_1_5(), Recipe("fp16", "fp16", "fp16")).values()) == (
        pytest.approx(51.0 * GB, rel=0.01)
    )


def test_a_bundle_tells_the_bytes_and_precision_of_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())
    options = QuantOptions(block=32, keep_fp16=("vision_model.encoder.layers.0.",))
    wanted: dict[str, Any] = {"vision": "int8", "language": "int4", "options": options, **KV8}
    bundle = export_bundle(checkpoint, tmp_path / "bundle", **wanted)
    manifest = open_bundle(bundle).manifest
    recipe = Recipe("int8", "int4", manifest.kv, options)
    computed = bundle_bytes(manifest.spec, recipe)
    assert list(manifest.parts) == [*PARTS, OTHER]
    for part, entry in manifest.parts.items():
        # Beyond the formula: inputs rescaled explicitly, 4 bytes each, behind a GELU.
        assert 0 <= entry.bytes - computed[part] <= 4 * 96 * 2
    assert main(["inspect", str(bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    parts = report["parts"]
    assert sum(part["bytes"] for part in parts.values()) == report["file_bytes"]
    assert parts["vision_linears"]["precision"] == "fp16 (4), int8 (4)"
    assert parts["decoder_linears"]["precision"] == "int4 block 32"
    assert parts["head"]["precision"] == "int8 block 32"
    assert (parts["projector"]["precision"], parts["embedding"]["precision"]) == ("int8", "int8")
    assert main(["inspect", str(bundle)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "decoder_linears" in x)
    assert line.endswith("KiB int4 block 32")


def test_a_bundle_without_parts_is_still_read(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor had it a seal."""
    data = json.loads((bundle / MANIFEST).read_text())
    assert data.pop("parts")
    assert data.pop("seal")
    (bundle / MANIFEST).write_text(json.dumps(data))
    assert read_manifest(bundle).parts == {}
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert "parts" not in json.loads(capsys.readouterr().out)
