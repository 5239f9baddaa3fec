"""How fast a W8A8 product is in each of its forms on this CPU, and in which it is exact."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.ceilings import product_model
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.products import (
    AS_STORED,
    FORMS,
    Form,
    Product,
    exact_form,
    wrong_products,
)

#: Rows, inputs and outputs: one tile through InternViT-6B's attention projection.
SHAPE = (1025, 3200, 3200)
REPEATS = 15
MEASURED: Product = "w8a8"


@dataclass(frozen=True)
class FormRate:
    """One form of the product.

    Attributes:
        form: its name; "float32" is the float product of the same shape.
        gflops: of the median run.
        exact: whether it gives NumPy's integers.
        used: whether it is the one that runs bundles here.
    """

    form: str
    gflops: float
    exact: bool
    used: bool


def measure_forms(threads: int, shape: Sequence[int] = SHAPE) -> list[FormRate]:
    """Time the product in float32 and in every form that packs, in turns."""
    forms = [form for form in FORMS if form.packs]
    sessions = [("float32", *_session("float32", AS_STORED, threads, shape))]
    sessions += [(form.name, *_session("int8", form, threads, shape)) for form in forms]
    times: dict[str, list[float]] = {name: [] for name, _, _ in sessions}
    for repeat in range(REPEATS + 1):
        for name, session, x in sessions:
            started = time.perf_counter()
            session.run(None, {"x": x})
            if repeat:  # the first is warm-up
                times[name].append(time.perf_counter() - started)
    operations = 2 * float(np.prod(shape))
    used = exact_form((MEASURED,)).name
    exact = {form.name: not wrong_products(form, [MEASURED]) for form in forms}
    return [
        FormRate(
            name, operations / statistics.median(taken) / 1e9, exact.get(name, True), name == used
        )
        for name, taken in times.items()
    ]


def _session(
    dtype: str, form: Form, threads: int, shape: Sequence[int]
) -> tuple[Any, NDArray[Any]]:
    ort = load_onnxruntime()
    model, x = product_model(dtype, shape)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # The other sessions' threads would spin into this one's first milliseconds.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in form.entries.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), x
