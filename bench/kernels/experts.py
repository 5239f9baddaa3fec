"""A layer of experts beside ONNX Runtime's QMoE, in turns in sessions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.turns import in_turns
from internvl_edge.bench.kernels.blocks import open_graph
from internvl_edge.bundle.contract import Tensor
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat, Blocks, block_bytes
from internvl_edge.export.graphs.dialects import Experts
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.products import AS_STORED

#: Width, inner width, experts, and how many a row goes through: InternVL3.5-30B-A3B.
SHAPE = (2048, 768, 128, 8)
FORM = BlockFormat(4, 128)
ROWS = (1, 4, 8, 64, 256)
#: Largest difference from QMoE, which rounds no inputs where weights have four bits, as a share of
#: the result's norm.
TOLERANCE = 0.05


@dataclass(frozen=True)
class ExpertsRow:
    """One number of rows; times are medians in milliseconds.

    Attributes:
        rows: of the inputs.
        qmoe_ms, kernel_ms: of ONNX Runtime's operator and of ours.
        speedup: of ours over it.
        gigabytes_per_s: of weights read by ours, of the experts that are chosen at all.
        difference: from QMoE; see `TOLERANCE`.
    """

    rows: int
    qmoe_ms: float
    kernel_ms: float
    speedup: float
    gigabytes_per_s: float
    difference: float


def measure_experts(kernel: OwnKernel, threads: int, runs: int) -> list[ExpertsRow]:
    """Time a layer for every number of rows.

    Args:
        kernel: with a library.
        threads: of each session.
        runs: of each; the first, which warms up, is not counted.
    """
    with scratch_folder() as folder:
        graph = _write(folder)
        sessions = {
            "qmoe": open_graph(graph, threads, AS_STORED),
            "kernel": open_graph(graph, threads, AS_STORED, kernel),
        }
        return [_measure(sessions, rows, runs) for rows in ROWS]


def _measure(sessions: dict[str, Any], rows: int, runs: int) -> ExpertsRow:
    width, _, experts, chosen = SHAPE
    x = np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)
    calls = {name: partial(session.run, None, {"x": x}) for name, session in sessions.items()}
    timed = in_turns(calls, runs)
    qmoe, ours = timed["qmoe"].seconds, timed["kernel"].seconds
    (wanted,), (got,) = timed["qmoe"].result, timed["kernel"].result
    order = np.argsort(-(x @ _router().T), axis=-1)[:, :chosen]
    read = len(np.unique(order)) * _layer_bytes() / experts
    return ExpertsRow(
        rows=rows,
        qmoe_ms=round(qmoe * 1e3, 3),
        kernel_ms=round(ours * 1e3, 3),
        speedup=round(qmoe / ours, 2),
        gigabytes_per_s=round(read / ours / 1e9, 1),
        difference=float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)),
    )


def _layer_bytes() -> int:
    width, inner, experts, _ = SHAPE
    gated, down = (experts * 2 * inner, width), (experts * width, inner)
    return block_bytes(*gated, FORM) + block_bytes(*down, FORM)


def _router() -> NDArray[np.float32]:
    width, _, experts, _ = SHAPE
    return np.random.default_rng(0).standard_normal((experts, width)).astype(np.float32)


def _write(folder: Path) -> Path:
    """Write a graph of a layer, its weights beside it as in a bundle."""
    width, inner, experts, chosen = SHAPE
    random = np.random.default_rng(1)
    plans, held = {}, {"router": Weight.held("router", _router())}
    shapes = {"gated": (experts * 2 * inner, width), "down": (experts * width, inner)}
    for name, (rows, inputs) in shapes.items():
        count = FORM.blocks(inputs)
        values = random.integers(0, 256, (rows, count, FORM.block // 2), np.uint8)
        scales = random.random((rows, count), np.float32) * np.float32(inputs**-0.5 / 4)
        plans[name] = LinearPlan("blocks", form=FORM, packed=Blocks(values, scales, None))
        # Of what is packed, the shape alone is asked for.
        held[name] = Weight(name, "float32", (rows, inputs), lambda: iter(()))
    graph = GraphBuilder("experts")
    x = graph.input(Tensor("x", "float32", ("rows", width)))
    dialect = OnnxRuntimeDialect(graph, QuantPlan(plans))
    y = dialect.mixture(x, Experts(**held, per_token=chosen, normed=True), "experts")
    graph.output(y, Tensor("y", "float32", ("rows", width)))
    graph.save(folder, lambda _: None)
    return folder / "experts.onnx"


def render_experts(rows: Sequence[ExpertsRow], threads: int) -> list[str]:
    """Return the lines of a report; none where nothing was measured."""
    if not rows:
        return []
    width, inner, experts, chosen = SHAPE
    head = f"{chosen} of {experts} experts, {width} -> {inner} -> {width}, {threads} threads"
    return [
        "",
        f"{head}: {FORM.bits} bits, block {FORM.block}",
        *(
            f"  {row.rows:4} rows  QMoE {row.qmoe_ms:9.2f} ms, ours {row.kernel_ms:9.2f} ms ="
            f" {row.speedup:5.2f}x faster, {row.gigabytes_per_s:5.1f} GB/s"
            for row in rows
        ),
    ]
