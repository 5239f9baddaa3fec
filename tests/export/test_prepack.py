"""Packed weights as ONNX Runtime takes them: by a hash alone, or compared byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data
from packaging.version import Version

from internvl_edge.export.prepare.prepack import PREPACKED, compares_packed, prepack_graph
from internvl_edge.runtime.backends import products

PROBES = Path(products.__file__).parent / "probes"


@pytest.fixture(params=[False, True], ids=["hash only", "compared"])
def compared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether packed forms are stored as for an ONNX Runtime that compares them."""
    compared: bool = request.param
    if compares_packed() and not compared:
        pytest.skip(f"onnxruntime {ort.__version__} compares packed forms")
    monkeypatch.setattr("internvl_edge.export.prepare.prepack.compares_packed", lambda: compared)
    return compared


def test_onnxruntime_compares_packed_forms_from_1_32_on() -> None:
    assert compares_packed() == (Version(ort.__version__) >= Version("1.32"))


def test_an_onnxruntime_that_compares_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version at hand may not: this one refuses as 1.32 does."""

    def refuse(*_: object, **__: object) -> None:
        raise ort.capi.onnxruntime_pybind11_state.Fail("do not match the buffers generated")

    monkeypatch.setattr("internvl_edge.export.prepare.prepack._Probe.open_with", refuse)
    assert compares_packed.__wrapped__()


@pytest.mark.parametrize("product", ["int4", "int8", "w8a8"])
def test_the_same_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: bool, product: str
) -> None:
    """Where forms are compared, a packed weight says it is itself, and elsewhere other bytes."""
    monkeypatch.setattr("internvl_edge.export.prepare.prepack.LEAST_BYTES", 1 << 12)
    model = onnx.load(str(PROBES / f"{product}.onnx"))
    weights = {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    plain, packed = both(model, tmp_path)
    forms = packed_initializers(packed)
    assert forms
    # The last of the file's few places may be its own.
    itself = [said == weights[name] for name, said in forms.items()]
    assert all(itself) if compared else not all(itself)
    x = np.random.default_rng(0).integers(-128, 128, (2, products.WIDTH)).astype(np.float32)
    for got, wanted in zip(run(packed, x), run(plain, x), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize("zeros", [0, 1, 3])
def test_matrices_of_equal_bytes_are_not_confused(tmp_path: Path, zeros: int) -> None:
    """Places in the file that hold the same bytes lead to the same packed form."""
    rng = np.random.default_rng(0)
    weights = [np.zeros((256, 256), np.float32)] * zeros
    weights += [rng.standard_normal((256, 256)).astype(np.float32) for _ in range(3)]
    names = [f"w{i}" for i in range(len(weights))]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", name], [f"y{name}"]) for name in names],
        "several",
        [value("x", TensorProto.FLOAT, [2, 256])],
        [value(f"y{name}", TensorProto.FLOAT, [2, 256]) for name in names],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 21)]
    plain, packed = both(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    for got, wanted in zip(run(packed, x), run(plain, x), strict=True):
        np.testing.assert_array_equal(got, wanted)


def both(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path]:
    """Write a graph with external data, and packed."""
    plain, packed = folder / "plain" / "several.onnx", folder / "several.onnx"
    plain.parent.mkdir()
    convert_model_to_external_data(model, location="several.data", size_threshold=1 << 10)
    onnx.save(model, str(plain))
    prepack_graph(plain, [packed], lambda count: None)
    return plain, packed


def run(path: Path, x: NDArray[np.float32]) -> list[NDArray[Any]]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results: list[NDArray[Any]] = session.run(None, {"x": x})
    return results


def packed_initializers(path: Path) -> dict[str, bytes]:
    """What the packed initializers of a graph say they are, by name."""
    model = onnx.load(str(path), load_external_data=False)
    data = path.with_suffix(".data").read_bytes()
    found = {}
    for tensor in model.graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        if PREPACKED in entry:
            start = int(entry["offset"])
            found[tensor.name] = data[start : start + int(entry["length"])]
    return found
