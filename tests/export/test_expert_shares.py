"""Shares of experts: normed, or of a softmax over all of them as they are, in any precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from internvl_edge.bundle.contract import Tensor
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat
from internvl_edge.export.graphs.dialects import Experts
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.own_kernel import own_kernel

COUNT, CHOSEN, HIDDEN, WIDTH = 6, 2, 64, 32


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_shares_are_those_of_the_model(
    normed: bool, bits: int | None, own: bool, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)

    router, x = 2 * drawn(COUNT, HIDDEN), 8 * drawn(20, HIDDEN)
    gated, down = drawn(COUNT, 2 * WIDTH, HIDDEN), drawn(COUNT, HIDDEN, WIDTH)
    plans = {}
    if bits is not None:
        plans = dict.fromkeys(("gated", "down"), LinearPlan("blocks", BlockFormat(bits, 32)))
    graph = GraphBuilder("experts")
    held = (
        Weight.held(name, array.reshape(-1, array.shape[-1]))
        for name, array in (("router", router), ("gated", gated), ("down", down))
    )
    given = graph.input(Tensor("x", "float32", ("rows", HIDDEN)))
    dialect = OnnxRuntimeDialect(graph, QuantPlan(plans))
    y = dialect.mixture(given, Experts(*held, per_token=CHOSEN, normed=normed), "mixture")
    graph.output(y, Tensor("y", "float32", ("rows", HIDDEN)))
    graph.save(tmp_path, lambda _: None)

    options, kernel = ort.SessionOptions(), own_kernel(BLOCKS)
    path: str | bytes = str(tmp_path / "experts.onnx")
    if own:
        if kernel.library is None:
            pytest.skip(kernel.name)
        path = kernel.give(tmp_path / "experts.onnx", options)
    (got,) = ort.InferenceSession(path, options).run(None, {"x": x})

    logits = (x @ router.T).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    wanted = np.zeros_like(got, np.float64)
    for row, experts in enumerate(np.argsort(-shares, axis=-1)[:, :CHOSEN]):
        total = shares[row, experts].sum() if normed else 1
        for expert in experts:
            both = gated[expert] @ x[row]
            inner = both[::2] / (1 + np.exp(-both[::2])) * both[1::2]
            wanted[row] += shares[row, expert] / total * (down[expert] @ inner)
    difference = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert difference < (1e-5 if bits is None else 0.03)
