"""The extrapolation from a few layers to the whole model, on builds made up for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from internvl_edge.bench.gpu.engines import (
    extrapolate,
    integer_plan,
    render_builds,
    render_whole,
    true_width,
    verdict,
)
from internvl_edge.export.checkpoint.names import EMBEDDING
from internvl_edge.export.tensorrt.gate import GraphReport

GIB = 1 << 30
ONE = GraphReport(
    graph="language.onnx",
    capability=80,
    parsed_layers=10,
    engine_layers=5,
    products={"fp16 x int4": 5},
    widened=[],
    apart=[],
    expected_bytes=700,
    weight_bytes=701,
    plan_bytes=710,
    scratch_bytes=50,
    peak_bytes=1500,
    seconds=1.0,
)


def test_layers_add_up() -> None:
    two = replace(ONE, expected_bytes=900, plan_bytes=912, peak_bytes=1900)
    vision, language = extrapolate([ONE, ONE], [two, two])
    spec = true_width()
    assert (vision.layers, language.layers) == (45, 48)
    assert language.file_bytes == 700 + 47 * 200
    assert language.plan_bytes == 710 + 47 * 202
    assert language.peak_bytes == 1500 + 47 * 400
    assert language.scratch_bytes == ONE.scratch_bytes  # layers share it
    assert vision.file_bytes == 700 + (spec.vision.layers_run - 1) * 200
    text = render_builds([[ONE, ONE], [two, two]]) + render_whole([vision, language], [])
    assert "5 fp16 x int4" in text


@pytest.mark.parametrize(
    ("gib", "builds", "runs"), [(4, True, True), (20, True, False), (30, False, False)]
)
def test_what_a_board_with_32_gb_takes(gib: int, builds: bool, runs: bool) -> None:
    whole = extrapolate([ONE, ONE], [ONE, ONE])
    whole = [replace(item, peak_bytes=gib * GIB, plan_bytes=gib * GIB) for item in whole]
    found = verdict("orin-agx-32", whole)
    # Two engines, their scratch, and 4096 tokens of float16 keys and values of 48 layers.
    assert found["running_bytes"] == 2 * gib * GIB + 100 + 2 * 48 * 8 * 128 * 4096 * 2
    assert (found["builds"], found["runs"]) == (builds, runs)


def test_every_matrix_but_the_table_is_planned() -> None:
    plan = integer_plan(true_width(1))
    kinds = [linear.kind for linear in plan.linears.values()]
    assert kinds.count("blocks") == 5 + 1
    assert kinds.count("int8") == 4 + 2
    assert EMBEDDING not in plan.linears
