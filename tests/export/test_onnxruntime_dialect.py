"""Blocks as the ONNX Runtime dialect writes them, run, against their definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sessions import cpu_session

from internvl_edge.bundle.contract import Tensor
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import Floats, quantize_channels
from internvl_edge.export.graphs.dialects import Linear, onnxruntime
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder

ROWS, WIDTH, WIDE = 5, 12, 50
UP_SCALE, DOWN_SCALE = 0.03, 0.1


@pytest.fixture
def layers() -> tuple[Linear, Linear]:
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Weight:
        return Weight.held(name, random.standard_normal(shape).astype(np.float32))

    up = Linear(weight("up", WIDE, WIDTH), weight("up.bias", WIDE), "fc1")
    gain = weight("gain", WIDTH)
    return up, Linear(weight("down", WIDTH, WIDE), weight("down.bias", WIDTH), "fc2", gain)


@pytest.mark.parametrize("columns", [WIDE, 20, 7])  # one part, three, eight: uneven ones too
def test_integer_mlp_means_the_same_in_any_number_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: tuple[Linear, Linear], columns: int
) -> None:
    monkeypatch.setattr(onnxruntime, "PRODUCT_COLUMNS", columns)
    up, down = layers
    factors = np.linspace(0.5, 2, WIDE, dtype=np.float32)
    plan = QuantPlan(
        {
            "up": LinearPlan("int8", input_scale=UP_SCALE),
            "down": LinearPlan("int8", input_scale=DOWN_SCALE, input_factors=factors),
        }
    )
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    (got,) = _run(plan, tmp_path, x, lambda dialect: [dialect.gelu_mlp("x", up, down)], WIDTH)
    hidden = _gelu(_product(x, up, UP_SCALE)) * factors
    expected = _product(hidden, down, DOWN_SCALE)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)  # half a step of the biases


@pytest.mark.parametrize("kind", ["float", "int8", "mixed"])
def test_gain_and_split(tmp_path: Path, layers: tuple[Linear, Linear], kind: str) -> None:
    """Within int8's error of the float definition; the gain goes to bias and product alike."""
    up, down = layers
    int8 = LinearPlan("int8", input_scale=UP_SCALE)
    int8_down = LinearPlan("int8", input_scale=DOWN_SCALE)
    plan = {"float": {}, "int8": {"up": int8, "down": int8_down}, "mixed": {"up": int8}}[kind]
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    parts = _run(
        QuantPlan(plan),
        tmp_path,
        x,
        lambda dialect: dialect.split_linear("x", up.weight, up.bias, 5, "fc1"),
        WIDE // 5,
    )
    wide = x @ _array(up.weight).T + _array(up.bias)
    loose = 1e-5 if kind == "float" else 0.15  # 12 inputs, each within 1/2 of 0.03
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wide, rtol=0, atol=loose)
    (tmp_path / "mlp").mkdir()
    mlp = _run(
        QuantPlan(plan),
        tmp_path / "mlp",
        x,
        lambda dialect: [dialect.gelu_mlp("x", up, down)],
        WIDTH,
    )
    expected = (_gelu(wide) @ _array(down.weight).T + _array(down.bias)) * _array(down.gain)
    assert _cosine(mlp[0], expected) > (0.999999 if kind == "float" else 0.999)


def _run(
    plan: QuantPlan,
    folder: Path,
    x: Floats,
    build: Callable[[OnnxRuntimeDialect], list[str]],
    width: int,
) -> list[NDArray[np.float32]]:
    dialect = OnnxRuntimeDialect(GraphBuilder("block"), plan)
    dialect.graph.input(Tensor("x", "float32", ("rows", x.shape[1])))
    for i, value in enumerate(build(dialect)):
        dialect.graph.output(value, Tensor(f"y{i}", "float32", ("rows", width)))
    dialect.graph.save(folder, lambda _: None)
    session = cpu_session(folder / "block.onnx")
    return list(session.run(None, {"x": x}))


def _product(x: NDArray[np.floating], layer: Linear, scale: float) -> NDArray[np.float64]:
    """W8A8 by definition: both sides rounded, bias and gain in float64."""
    values, scales = quantize_channels(_array(layer.weight))
    rounded = np.clip(np.rint(x / np.float32(scale)), -128, 127).astype(np.float64) * scale
    y = rounded @ (values * scales[:, np.newaxis].astype(np.float64)).T + _array(layer.bias)
    return y if layer.gain is None else y * _array(layer.gain)


def _gelu(x: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(torch.nn.functional.gelu(torch.from_numpy(x.astype(np.float64))).numpy())


def _array(weight: Weight | None) -> Floats:
    assert weight is not None
    return np.concatenate(list(weight.cast_blocks())).astype(np.float32)


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
