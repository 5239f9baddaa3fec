"""Integer products that are exact: which form of them is, is a property of the machine.

On x86 without VNNI, kernels for unsigned times signed bytes add pairs of products in saturating
int16 (255 * 127 * 2 is beyond it). What is stored is the form that is fast with VNNI; whether it is
exact here is not concluded from the CPU's features but tried: the products in `probes/`, full-range
values in the very operators that `export` writes, are compared with NumPy's integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.errors import DeviceError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.trials import (
    open_probe,
    probe_options,
    recalled,
    remember,
    trial_key,
)

#: An operator that multiplies integers: W8A8, and MatMulNBits with weights of 8 and 4 bits.
Product = Literal["w8a8", "int8", "int4"]

#: Inputs and outputs of each probe's products.
WIDTH, COLUMNS = 256, 32
#: Blocks of the weight-only products, one after the other in a probe's outputs.
BLOCKS = (32, 64, 128, 256)
#: Rows of the inputs tried: decoding and prefilling take different kernels.
ROWS = (1, 17)
#: Smallest and largest weight of each product, and its largest input.
LIMITS: Mapping[Product, tuple[int, int]] = {
    "w8a8": (-127, 127),
    "int8": (-128, 127),
    "int4": (-8, 7),
}
LARGEST_INPUT = 127

_MULTIPLIER = 2654435761  # Knuth's multiplicative hash


@dataclass(frozen=True)
class Form:
    """A way to run integer products.

    Attributes:
        name: for people, and in the cache.
        entries: of ONNX Runtime's session configuration.
        packs: whether weights are packed, so that they can be prepared.
    """

    name: str
    entries: Mapping[str, str] = field(default_factory=dict)
    packs: bool = True


AS_STORED = Form("as stored")
#: ONNX Runtime turns signed weights into unsigned ones when it loads a graph, if it finds that its
#: kernel saturates here.
UNSIGNED = Form("unsigned weights", {"session.x64quantprecision": "1"})
#: Weight-only products then compute in float32: right and slow.
UNPACKED = Form("unpacked", {**UNSIGNED.entries, "session.disable_prepacking": "1"}, packs=False)

#: The fastest first.
FORMS = (AS_STORED, UNSIGNED, UNPACKED)


def products_of(manifest: Manifest) -> tuple[Product, ...]:
    """Return the integer products in a bundle's graphs; TensorRT's graphs have none on the CPU."""
    if manifest.traits.engines:
        return ()
    products: list[Product] = []
    if manifest.vision == "int8":
        products.append("w8a8")
    if manifest.language in ("int8", "int4"):
        products.append("int8")  # an int4 decoder's head may be
    if manifest.language == "int4":
        products.append("int4")
    return tuple(products)


def bundle_form(manifest: Manifest, products: tuple[Product, ...] | None = None) -> Form:
    """Return the form in which a bundle's products are exact on this machine.

    It is tried once for each machine, version of ONNX Runtime and pair of graphs, which takes some
    milliseconds, and remembered in the user's cache.

    Args:
        manifest: of the bundle.
        products: those that ONNX Runtime computes; None: all there are.

    Raises:
        DeviceError: there is none.
    """
    products = products_of(manifest) if products is None else products
    if not products:
        return AS_STORED
    key = _key(manifest, products)
    found = recalled(key)
    for form in FORMS:
        if form.name == found:
            return form
    form = exact_form(products)
    remember(key, form.name)
    return form


@functools.cache
def exact_form(products: tuple[Product, ...]) -> Form:
    """Return the first of `FORMS` in which all these products are exact on this machine.

    Raises:
        DeviceError: there is none.
    """
    for form in FORMS:
        wrong = wrong_products(form, products)
        if not wrong:
            return form
    ort = load_onnxruntime()
    raise DeviceError(
        f"onnxruntime {ort.__version__} multiplies integers wrongly on this CPU"
        f" ({', '.join(wrong)}, compared with NumPy); install another version of it;"
        " 'internvl-edge doctor' says more for a bug report",
        [Remedy.FP32_VISION, Remedy.FP32_LANGUAGE],
    )


def use_exact_products(options: Any) -> None:
    """Set `onnxruntime.SessionOptions` so that every integer product is exact on this machine.

    Raises:
        DeviceError: there is no such form.
    """
    for key, value in exact_form(get_args(Product)).entries.items():
        options.add_session_config_entry(key, value)


def wrong_products(form: Form, products: Sequence[Product]) -> list[Product]:
    """Return those products that differ from NumPy's integers on this machine."""
    return [product for product in products if not _is_exact(form, product)]


def _is_exact(form: Form, product: Product) -> bool:
    path = str(probe_file(product))
    return gives_integers(lambda: open_probe(path, probe_options(form.entries)), product)


def probe_file(product: Product) -> Path:
    """Return the graph by which a product is tried."""
    return Path(__file__).with_name("probes") / f"{product}.onnx"


def gives_integers(open_session: Callable[[], Any], product: Product) -> bool:
    """Return whether a session of a product's probe opens, runs, and gives NumPy's integers."""
    inputs = [probe_input(rows) for rows in ROWS]
    try:
        session = open_session()
        results = [session.run(None, {"x": x.astype(np.float32)}) for x in inputs]
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no common class: not this form
        return False
    weight = full_range(COLUMNS, WIDTH, *LIMITS[product])
    pairs = zip(inputs, results, strict=True)
    return all(np.array_equal(got, x @ weight.T) for x, outputs in pairs for got in outputs)


def full_range(rows: int, columns: int, low: int, high: int) -> NDArray[np.int64]:
    """Return integers `(rows, columns)` that saturate what can: one row of the largest, one of the
    smallest, and both mixed."""
    index = np.arange(rows * columns, dtype=np.uint64).reshape(rows, columns)
    mixed = (index * np.uint64(_MULTIPLIER) >> np.uint64(31)) & np.uint64(1)
    values = np.where(mixed == 1, high, low).astype(np.int64)
    values[0], values[1] = high, low
    return values


def probe_input(rows: int) -> NDArray[np.int64]:
    """Return integers `(rows, WIDTH)` whose rounding to int8 in blocks is exact: each begins with
    the largest, so that its scale is one."""
    index = np.arange(rows * WIDTH, dtype=np.uint64).reshape(rows, WIDTH)
    spread = (index * np.uint64(_MULTIPLIER) >> np.uint64(16)) % np.uint64(2 * LARGEST_INPUT + 1)
    values = spread.astype(np.int64) - LARGEST_INPUT
    values[0] = LARGEST_INPUT
    values[:, :: min(BLOCKS)] = LARGEST_INPUT
    return values


def _key(manifest: Manifest, products: Sequence[Product]) -> str:
    """Return a name of what the result depends on: graphs, and the probes themselves."""
    graphs = [manifest.files[graph].sha256.encode() for graph in (VISION_GRAPH, LANGUAGE_GRAPH)]
    return trial_key([*graphs, *(probe_file(product).read_bytes() for product in products)])
