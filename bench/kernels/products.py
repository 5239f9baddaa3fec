"""How fast a W8A8 product is in each of its forms on this CPU, and in which it is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from internvl_edge.bench.common.ceilings import product_model
from internvl_edge.bench.common.turns import in_turns, session_options
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
    calls = {"float32": _product("float32", AS_STORED, threads, shape)}
    calls |= {form.name: _product("int8", form, threads, shape) for form in forms}
    operations = 2 * float(np.prod(shape))
    used = exact_form((MEASURED,)).name
    exact = {form.name: not wrong_products(form, [MEASURED]) for form in forms}
    return [
        FormRate(name, operations / one.seconds / 1e9, exact.get(name, True), name == used)
        for name, one in in_turns(calls, REPEATS).items()
    ]


def _product(dtype: str, form: Form, threads: int, shape: Sequence[int]) -> Callable[[], Any]:
    model, x = product_model(dtype, shape)
    options = session_options(threads, form)
    session = load_onnxruntime().InferenceSession(model, options, ["CPUExecutionProvider"])
    return partial(session.run, None, {"x": x})
