"""Operations and bytes from the spec, against what the exported graphs hold and run.

Every product's operand shapes are read off ONNX Runtime by making them outputs of the graph, with
optimisation off; weight bytes are those of the initializers that feed each product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from internvl_edge.bench.common.ceilings import Ceilings
from internvl_edge.bench.common.limits import Weights, phase_limits
from internvl_edge.bench.common.roofline import Ceiling, Work
from internvl_edge.bench.latency.operators import Phase, profile_bundle
from internvl_edge.bench.scale.members import CONFIGS, internvl_1_5
from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import Bundle, open_bundle
from internvl_edge.bundle.rope import rope_rows
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.sizes import bundle_bytes

WITHIN = 0.01
#: Inputs of each product that hold its weight: values, scales, zero points, integer bias.
WEIGHTS = {"Gemm": (1,), "MatMul": (1,), "QGemm": (3, 4, 6), "MatMulNBits": (1, 2, 3)}
ATTENTIONS = ("MultiHeadAttention", "GroupQueryAttention")
BUNDLES = ("float_bundle", "integer_bundle")


@dataclass(frozen=True)
class Counted:
    """One node of a graph: operations of a run, bytes of its weight."""

    name: str
    operator: str
    operations: float
    weight_bytes: int


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(request.getfixturevalue(request.param), verify="size")


def count(graph: Path, feeds: dict[str, Any], tokens: int = 0, cached: int = 0) -> list[Counted]:
    """Walk a graph's products."""
    model = onnx.load(graph)
    weights = {item.name: numpy_helper.to_array(item).nbytes for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in (*WEIGHTS, *ATTENTIONS)]
    given = {item.name for item in (*model.graph.input, *model.graph.output)}
    wanted = {name for node in nodes for name in (node.input[0], node.output[0])} - given
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(None, feeds), strict=True)) | feeds
    return [
        Counted(
            node.name,
            node.op_type,
            operations(node, values, tokens, cached),
            sum(
                weights[node.input[place]]
                for place in WEIGHTS.get(node.op_type, ())
                if place < len(node.input) and node.input[place]
            ),
        )
        for node in nodes
    ]


def operations(node: Any, values: dict[str, Any], tokens: int, cached: int) -> float:
    """Two for each multiplication that is added up."""
    result = values[node.output[0]].shape
    if (
        node.op_type == "GroupQueryAttention"
    ):  # row by row: it sees what is cached, and up to itself
        return sum(4.0 * result[-1] * (cached + row + 1) for row in range(tokens))
    operand = values[node.input[0]].shape
    if node.op_type == "MultiHeadAttention":  # scores, then values: (length x length) by width
        batch, length, width = operand
        return 2.0 * 2 * batch * length * length * width
    return 2.0 * math.prod(operand) * result[-1]


def vision_counts(bundle: Bundle, tiles: int) -> list[Counted]:
    side = bundle.spec.vision.tile_size
    picture = np.zeros((tiles, side, side, 3), np.uint8)
    return count(bundle.file(contract.VISION_GRAPH), {contract.TILES: picture})


def language_counts(bundle: Bundle, tokens: int, cached: int) -> list[Counted]:
    language, manifest = bundle.spec.language, bundle.manifest
    total = tokens + cached
    cos, sin = rope_rows(language, language.rope_theta, 0, total)
    feeds: dict[str, Any] = {
        contract.EMBEDDINGS: np.ones((tokens, language.hidden_size), np.float32),
        contract.ROPE_COS: cos.astype(np.float32),
        contract.ROPE_SIN: sin.astype(np.float32),
        contract.LAST_POSITION: np.array([total - 1], np.int32),
        contract.TOTAL_LENGTH: np.array(total, np.int32),
        contract.LOGIT_ROWS: np.array([tokens - 1], np.int64),
    }
    empty = np.zeros(contract.cache_shape(language, total), contract.CACHE_DTYPE[manifest.kv])
    for layer in range(language.num_hidden_layers):
        feeds |= {contract.past_key(layer): empty, contract.past_value(layer): empty}
    return count(bundle.file(contract.LANGUAGE_GRAPH), feeds, tokens, cached)


def split(nodes: list[Counted]) -> tuple[float, float]:
    """Operations of linear layers and of attention."""
    attention = math.fsum(node.operations for node in nodes if node.operator in ATTENTIONS)
    return math.fsum(node.operations for node in nodes) - attention, attention


@pytest.mark.parametrize("tiles", [1, 3])
def test_vision(bundle: Bundle, tiles: int) -> None:
    nodes = vision_counts(bundle, tiles)
    work = Weights.of(bundle.manifest).vision_pass(tiles)
    assert (work.linear, work.attention) == pytest.approx(split(nodes), rel=WITHIN)
    # The patch embedding is float always and counted elsewhere: see the last test.
    read = sum(node.weight_bytes for node in nodes if "/patch" not in node.name)
    assert work.read_bytes == pytest.approx(read, rel=WITHIN)


@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (1, 40), (33, 0), (5, 12)])
def test_language(bundle: Bundle, tokens: int, cached: int) -> None:
    nodes = language_counts(bundle, tokens, cached)
    work = Weights.of(bundle.manifest).language_pass(tokens, cached)
    assert (work.linear, work.attention) == pytest.approx(split(nodes), rel=WITHIN)
    spec, manifest = bundle.spec.language, bundle.manifest
    # Keys and values of the cached positions, all heads and layers.
    position = np.zeros(contract.cache_shape(spec, 1), contract.CACHE_DTYPE[manifest.kv]).nbytes
    cache = 2 * spec.num_hidden_layers * position * cached
    read = sum(node.weight_bytes for node in nodes) + cache
    assert work.read_bytes == pytest.approx(read, rel=WITHIN)


def test_a_graph_lacking_a_layer_is_noticed(float_bundle: Path) -> None:
    bundle = open_bundle(float_bundle, verify="size")
    nodes = [
        node for node in language_counts(bundle, 9, 0) if "layers.1/attention/wo" not in node.name
    ]
    work = Weights.of(bundle.manifest).language_pass(9, 0)
    assert abs(split(nodes)[0] / work.linear - 1) > WITHIN


def test_profiler_counts_the_same(bundle: Bundle) -> None:
    """ONNX Runtime's profile, after its own fusions, sees the operations of the spec."""
    vision, prefill, decode = profile_bundle(bundle, tiles=2, tokens=24, runs=1, threads=1)
    weights = Weights.of(bundle.manifest)
    for phase, work in (
        (vision, weights.vision_pass(2)),
        (prefill, weights.language_pass(24, 0)),
        (decode, weights.language_pass(1, 24)),
    ):
        assert isinstance(phase, Phase)
        assert phase.operations == pytest.approx(work.operations, rel=WITHIN)


def test_bound_is_the_slower_of_both() -> None:
    ceiling = Ceiling(linear=100.0, attention=10.0, bandwidth=8.0)
    assert ceiling.seconds(Work(linear=200.0, attention=5.0, read_bytes=8.0)) == 2.5
    assert ceiling.seconds(Work(linear=200.0, attention=5.0, read_bytes=80.0)) == 10.0


def test_limits_of_phases(float_bundle: Path) -> None:
    weights = Weights.of(open_bundle(float_bundle, verify="size").manifest)
    slow_memory = Ceilings(1, 1e6, 1e6, {"float32": 1e15})
    slow_arithmetic = Ceilings(1, 1e15, 1e15, {"float32": 1e6})
    for ceilings, by in ((slow_memory, "memory"), (slow_arithmetic, "arithmetic")):
        limits = phase_limits(weights, ceilings, tiles=2, prompt_tokens=20, new_tokens=4)
        assert {limits[name].by for name in ("vision", "prefill", "itl")} == {by}
        first = limits["vision"].seconds + limits["prefill"].seconds
        assert limits["ttft"].seconds == pytest.approx(first)
    assert "vision" not in phase_limits(
        weights, slow_memory, tiles=0, prompt_tokens=20, new_tokens=4
    )


def test_patch_embedding_is_nothing_at_true_width() -> None:
    spec = internvl_1_5()
    vision = spec.vision
    parts = bundle_bytes(spec, Recipe("int8", "int4", "int8", QuantOptions()))
    patch = 4 * 3 * vision.patch_size**2 * vision.hidden_size  # float32
    assert patch < 0.002 * (parts["vision_linears"] + parts["projector"])


def test_a_token_goes_through_some_experts() -> None:
    """Operations and bytes of InternVL3.5-30B-A3B: 3 of its 30 thousand million weights a token."""
    spec = parse_config(CONFIGS["internvl3_5-30b-a3b"])
    recipe = Recipe("int8", "int4", "fp32", QuantOptions())
    parts = bundle_bytes(spec, recipe)
    work = Weights(spec, parts, "int8", "int4", "fp32").language_pass(1, 0)
    head = spec.language.vocab_size * spec.language.hidden_size
    attention, expert = 2048 * (2 * 32 + 2 * 4) * 128, 3 * 2048 * 768
    weights = 48 * (attention + 8 * expert)
    assert work.linear == 2 * (weights + head)
    whole = 48 * (attention + 128 * expert)
    read = parts["decoder_linears"] * weights / whole + parts["head"]
    assert work.read_bytes == pytest.approx(read, rel=1e-9)
    assert 0.05 < work.read_bytes / sum(parts.values()) < 0.15
