"""The profile: whole, by block and operator, and honest about what runs in float."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import small_config, write_checkpoint
from command_line import error_line

from internvl_edge.bench.latency.operators import (
    CAUSAL,
    Node,
    Phase,
    _profile_language,
    in_float,
    profile_bundle,
    shares,
)
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime.backends.tower import TOWER, tower_kernel


def node(name: str, operator: str = "Gemm", dtype: str = "float", seconds: float = 1.0) -> Node:
    return Node(name, operator, dtype, seconds, 0.0)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("/vision/layers.12/attention/qkv.2", "layers/attention"),
        ("/language/layers.0/feed_forward/w1", "layers/feed_forward"),
        ("/vision/projector/fc1", "projector/fc1"),
        ("/language/head", "head"),
        ("/language/layers.3/ffn_norm", "layers/ffn_norm"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert node(name).block == block


def test_float_products_of_an_integer_part() -> None:
    nodes = (
        node("/vision/a", "Gemm", "float", 1.0),
        node("/vision/b", "MultiHeadAttention", "float16", 2.0),
        node("/vision/c", "QGemm", "uint8"),
        node("/vision/d", "MatMulNBits", "float"),  # rounds inside
        node("/vision/e", "Softmax", "float"),  # no product
    )
    phase = Phase("vision", "int8", nodes)
    assert [found.name for found in in_float(phase)] == ["/vision/b", "/vision/a"]
    assert in_float(replace(phase, precision="fp16")) == []


def test_a_bundle(integer_bundle: Path) -> None:
    bundle = open_bundle(integer_bundle, verify="size")
    vision, prefill, decode = profile_bundle(bundle, tiles=2, tokens=16, runs=2, threads=1)
    for phase in (vision, prefill, decode):
        assert len({found.name for found in phase.nodes}) == len(phase.nodes)
        for key in ("block", "operator"):
            parts = shares(phase, key)
            assert math.fsum(parts.values()) == pytest.approx(phase.seconds)
            assert list(parts.values()) == sorted(parts.values(), reverse=True)
    layers = bundle.spec.vision.layers_run
    operators = [found.operator for found in vision.nodes]
    ours, multiplies = tower_kernel().library is not None, tower_kernel().kind == TOWER
    attention = "IntegerAttentionRounded" if ours else "MultiHeadAttention"
    assert operators.count(attention) == layers
    # Query, key and value apart; proj, fc1, fc2; and the projector's two.
    counts = Counter(operators)
    if multiplies:
        assert counts["IntegerProductGeluRounded"] == layers + 1
        assert counts["IntegerProduct"] == 5 * layers + 1
    else:
        assert counts["QGemm"] == 6 * layers + 2
    floats = {"FloatProduct"} if ours else {"Gemm", "MultiHeadAttention"}
    assert {found.operator for found in in_float(vision)} == floats
    (attention,) = {found.operator for found in in_float(decode)}
    assert attention in CAUSAL


def test_passes_are_told_apart(integer_bundle: Path, tmp_path: Path) -> None:
    """Warm-up left out, and no step of decoding among the prefill's."""
    bundle = open_bundle(integer_bundle, verify="size")
    prefill, decode = _profile_language(bundle, 16, 3, 1, tmp_path)
    for passes, rows in ((prefill, 16), (decode, 1)):
        assert len(passes) == 3
        for events in passes:
            arguments = [event["args"] for event in events]
            attend = [item for item in arguments if item["op_name"] in CAUSAL]
            assert len(attend) == bundle.spec.language.num_hidden_layers
            for item in attend:
                assert list(item["output_type_shape"][0].values()) == [[1, rows, 128]]


def test_a_float_bundle_has_nothing_to_blame(float_bundle: Path) -> None:
    bundle = open_bundle(float_bundle, verify="size")
    for phase in profile_bundle(bundle, tiles=1, tokens=4, runs=1, threads=1):
        assert in_float(phase) == []
        assert phase.seconds > 0


def test_command(integer_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        "latency",
        "profile",
        str(integer_bundle),
        "--prompt",
        "8",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--top", "3"]) == 0
    text = capsys.readouterr().out
    assert "in float though stored as integers" in text
    assert "layers/attention" in text
    assert main([*arguments, "--json"]) == 0
    phases = json.loads(capsys.readouterr().out)
    assert [phase["phase"] for phase in phases] == [
        "vision, 1 tiles",
        "prefill, 8 tokens",
        "decode at 8 keys",
    ]


@pytest.mark.parametrize("option", ["--tiles", "--prompt", "--repeat", "--threads", "--top"])
def test_bad_options(option: str, integer_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "bench", "latency", "profile", integer_bundle, option, "0")
    assert f"{option} is 0" in line


def test_more_tiles_than_a_picture_has(
    integer_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "bench", "latency", "profile", integer_bundle, "--tiles", 1026)
    assert "--tiles is 1026, it must be at most 1025" in line


def test_a_tensorrt_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())
    bundle = export_bundle(checkpoint, tmp_path / "bundle", dialect="tensorrt")
    assert "export with --for onnxruntime" in error_line(
        capsys, "bench", "latency", "profile", bundle
    )


def test_a_prompt_beyond_the_context(
    integer_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "bench", "latency", "profile", integer_bundle, "--prompt", 10**6)
    assert "--prompt" in line
