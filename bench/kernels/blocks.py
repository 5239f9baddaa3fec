"""Products of weights in blocks beside ONNX Runtime's MatMulNBits and its INT8 product.

All run in turns in sessions of their own, with the same threads; medians are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.turns import in_turns, session_options
from internvl_edge.bundle.contract import Tensor
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat, Blocks, block_bytes
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime.backends.blocks import NO_KERNEL
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.products import AS_STORED, Form, Product, exact_form

#: Inputs and outputs: the MLP of InternLM2-20B.
SHAPE = (6144, 16384)
BLOCK = 128
ROWS = (1, 4, 8, 64, 256)
PRODUCTS: Mapping[int, Product] = {4: "int4", 8: "int8"}
#: Largest difference from MatMulNBits, which rounds alike, as a share of the largest result.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class BlockRow:
    """One width of weights and number of rows; times are medians in milliseconds.

    Attributes:
        bits: of a weight.
        rows: of the inputs.
        matmulnbits_ms, kernel_ms: of ONNX Runtime's product and of ours.
        speedup: of ours over it.
        gflops: operations a second of ours, in units of 1e9.
        gigabytes_per_s: of weights read by ours.
        percent_of_int8: of the rate of MatMulInteger, unsigned times signed bytes.
        difference: from MatMulNBits, at most; see `TOLERANCE`.
    """

    bits: int
    rows: int
    matmulnbits_ms: float
    kernel_ms: float
    speedup: float
    gflops: float
    gigabytes_per_s: float
    percent_of_int8: float
    difference: float


def measure_blocks(kernel: OwnKernel, threads: int, runs: int) -> list[BlockRow]:
    """Time the products of both widths for every number of rows.

    Args:
        kernel: with a library.
        threads: of each session.
        runs: of each product; the first, which warms up, is not counted.
    """
    measured = []
    with scratch_folder() as folder:
        integers = _write_integers(folder)
        for bits in PRODUCTS:
            blocks = _write_blocks(folder, bits)
            sessions = {
                "matmulnbits": open_graph(blocks, threads, exact_form((PRODUCTS[bits],))),
                "kernel": open_graph(blocks, threads, AS_STORED, kernel),
                "integers": open_graph(integers, threads, AS_STORED),
            }
            measured += [_measure(sessions, bits, rows, runs) for rows in ROWS]
    return measured


def _measure(sessions: Mapping[str, Any], bits: int, rows: int, runs: int) -> BlockRow:
    random = np.random.default_rng(rows)
    inputs, outputs = SHAPE
    x: NDArray[Any] = random.standard_normal((rows, inputs)).astype(np.float32)
    feeds = dict.fromkeys(sessions, x)
    feeds["integers"] = random.integers(0, 256, x.shape, np.uint8)
    calls = {
        name: partial(session.run, None, {"x": feeds[name]}) for name, session in sessions.items()
    }
    timed = in_turns(calls, runs)
    median = {name: one.seconds for name, one in timed.items()}
    (theirs,), (ours,) = timed["matmulnbits"].result, timed["kernel"].result
    return BlockRow(
        bits=bits,
        rows=rows,
        matmulnbits_ms=round(median["matmulnbits"] * 1e3, 3),
        kernel_ms=round(median["kernel"] * 1e3, 3),
        speedup=round(median["matmulnbits"] / median["kernel"], 2),
        gflops=round(2 * rows * inputs * outputs / median["kernel"] / 1e9, 1),
        gigabytes_per_s=round(_weight_bytes(bits) / median["kernel"] / 1e9, 1),
        percent_of_int8=round(100 * median["integers"] / median["kernel"], 1),
        difference=float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    )


def _weight_bytes(bits: int) -> int:
    inputs, outputs = SHAPE
    return block_bytes(outputs, inputs, BlockFormat(bits, BLOCK))


def _write_blocks(folder: Path, bits: int) -> Path:
    """Write a graph of MatMulNBits, its weight beside it as in a bundle."""
    inputs, outputs = SHAPE
    random = np.random.default_rng(0)
    form = BlockFormat(bits, BLOCK)
    count = form.blocks(inputs)
    packed = random.integers(0, 256, (outputs, count, BLOCK * bits // 8), np.uint8)
    blocks = Blocks(packed, random.random((outputs, count), np.float32), None)
    plan = QuantPlan({"w": LinearPlan("blocks", form=form, packed=blocks)})
    graph = GraphBuilder(f"blocks{bits}")
    x = graph.input(Tensor("x", "float32", ("rows", inputs)))
    shape = Weight("w", "float32", (outputs, inputs), lambda: iter(()))  # of what is packed
    y = OnnxRuntimeDialect(graph, plan).linear(x, shape, None, "product")
    graph.output(y, Tensor("y", "float32", ("rows", outputs)))
    graph.save(folder, lambda _: None)
    return folder / f"blocks{bits}.onnx"


def _write_integers(folder: Path) -> Path:
    """Write a graph of MatMulInteger, unsigned times signed bytes."""
    weight = np.random.default_rng(1).integers(-127, 128, SHAPE, np.int8)
    graph = GraphBuilder("integers")
    x = graph.input(Tensor("x", "uint8", ("rows", SHAPE[0])))
    y = graph.node("MatMulInteger", [x, graph.weight(Weight.held("w", weight))], "product")
    graph.output(y, Tensor("y", "int32", ("rows", SHAPE[1])))
    graph.save(folder, lambda _: None)
    return folder / "integers.onnx"


def open_graph(graph: Path, threads: int, form: Form, kernel: OwnKernel = NO_KERNEL) -> Any:
    """Open a graph as `onnxruntime.InferenceSession` on the CPU, its nodes given to the kernel."""
    options = session_options(threads, form)
    model = kernel.give(graph, options)
    return load_onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])


def render_blocks(kernel: OwnKernel, rows: Sequence[BlockRow], threads: int) -> list[str]:
    """Return the lines of a report."""
    inputs, outputs = SHAPE
    head = f"Weights in blocks, {inputs} -> {outputs}, block {BLOCK}, {threads} threads: {kernel}"
    return [
        "",
        head,
        *(
            f"  {row.bits} bits, {row.rows:4} rows  MatMulNBits {row.matmulnbits_ms:9.2f} ms, ours"
            f" {row.kernel_ms:9.2f} ms = {row.speedup:5.2f}x faster, {row.gflops:7.1f} GFLOP/s,"
            f" {row.gigabytes_per_s:5.1f} GB/s, {row.percent_of_int8:5.1f} % of MatMulInteger"
            for row in rows
        ),
    ]
