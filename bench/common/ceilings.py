"""What this machine can do at best, measured now: the denominators of every percentage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.roofline import Ceiling
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import use_exact_products

#: Far beyond any last-level cache, and long enough that starting the threads does not count: four
#: threads read 256 MiB at 46-51 GB/s and 1 GiB at 59-71 on an AMD EPYC.
ARRAY_BYTES = 1 << 30
#: Rows, inputs and outputs of the matrix product: one tile through half of InternViT-6B's fc1.
PRODUCT = (1025, 1600, 6400)

#: The arithmetic of a linear layer whose weights are stored so, on the CPU: block formats round
#: activations to 8 bits, so that integers are multiplied there too.
ARITHMETIC = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int8"}


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of copying (read plus written) and reading, operations a second by dtype."""

    threads: int
    copy_bytes_per_s: float
    read_bytes_per_s: float
    operations_per_s: Mapping[str, float]

    def ceiling(self, precision: str) -> Ceiling:
        """Limits of a graph whose linear layers have this precision; attention is in float."""
        attention = "float16" if precision == "fp16" else "float32"
        return Ceiling(
            self.operations_per_s[ARITHMETIC[precision]],
            self.operations_per_s[attention],
            self.read_bytes_per_s,
        )


def measure_ceilings(threads: int, precisions: Sequence[str]) -> Ceilings:
    """Measure what bundles of these precisions are held against."""
    dtypes = {"float32", *(ARITHMETIC[precision] for precision in precisions)}
    return Ceilings(
        threads=threads,
        copy_bytes_per_s=copy_bandwidth(threads),
        read_bytes_per_s=read_bandwidth(threads),
        operations_per_s={dtype: matrix_rate(dtype, threads) for dtype in sorted(dtypes)},
    )


def copy_bandwidth(threads: int, *, runs: int = 20) -> float:
    """Bytes a second, read plus written, of `threads` copying large arrays; the best of `runs`."""
    # Both written once: untouched pages would all be read from one page of zeros.
    source = np.ones((threads, ARRAY_BYTES // threads), np.uint8)
    target = np.ones_like(source)
    with ThreadPoolExecutor(threads) as pool:
        best = _best(lambda: list(pool.map(np.copyto, target, source)), runs)
    return 2 * source.nbytes / best


def read_bandwidth(threads: int, *, runs: int = 20) -> float:
    """Bytes a second of `threads` reading large arrays; the best of `runs`.

    The reader is NumPy's maximum of 64-bit integers: a load and a compare per vector, 33 GB/s on
    one core and 59-71 on four of an AMD EPYC, a dot product no more.
    """
    source = np.ones((threads, ARRAY_BYTES // threads // 8), np.int64)
    with ThreadPoolExecutor(threads) as pool:
        best = _best(lambda: list(pool.map(np.max, source)), runs)
    return source.nbytes / best


def matrix_rate(dtype: str, threads: int, *, runs: int = 5) -> float:
    """Operations a second of ONNX Runtime's own matrix product; the best of `runs`.

    Args:
        dtype: float32, float16, or int8 (unsigned times signed, as W8A8 layers run).
    """
    ort = load_onnxruntime()

    model, x = product_model(dtype, PRODUCT)
    options = ort.SessionOptions()
    use_exact_products(options)
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": x})
    return 2 * float(np.prod(PRODUCT)) / _best(lambda: session.run(None, {"x": x}), runs)


def _best(task: Callable[[], object], runs: int) -> float:
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        task()
        best = min(best, time.perf_counter() - started)
    return best


def product_model(dtype: str, shape: Sequence[int]) -> tuple[bytes, NDArray[Any]]:
    """A graph of one matrix product, and its input.

    Args:
        dtype: see `matrix_rate`.
        shape: rows, inputs and outputs.
    """
    from onnx import helper, numpy_helper

    rows, inner, columns = shape
    random = np.random.default_rng(0)
    if dtype == "int8":
        x: NDArray[Any] = random.integers(0, 255, (rows, inner), np.uint8)
        weight: NDArray[Any] = random.integers(-127, 127, (columns, inner), np.int8)
        constants = {
            "scale": np.float32(0.01),
            "zero": np.uint8(128),
            "w": weight,
            "scales": np.full(columns, 0.01, np.float32),
            "zeros": np.zeros(columns, np.int8),
        }
        node = helper.make_node(
            "QGemm",
            ["x", "scale", "zero", "w", "scales", "zeros"],
            ["y"],
            transB=1,
            domain="com.microsoft",
        )
        result = "float32"
    else:
        x = random.random((rows, inner), np.float32).astype(dtype)
        constants = {"w": random.random((columns, inner), np.float32).astype(dtype)}
        node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        result = dtype
    kind = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind(x.dtype), [rows, inner])],
        [helper.make_tensor_value_info("y", kind(np.dtype(result)), [rows, columns])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), x
