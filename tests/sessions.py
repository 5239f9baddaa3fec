"""ONNX Runtime sessions of the tests' own, over graphs that hold integer products."""

from __future__ import annotations

from os import PathLike

import onnxruntime as ort

from internvl_edge.runtime.backends.products import use_exact_products


def cpu_session(model: bytes | str | PathLike[str]) -> ort.InferenceSession:
    """Open a graph on the CPU with the form of integer products that is exact there."""
    options = ort.SessionOptions()
    use_exact_products(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
