"""Integer products of a graph are given to our operator where it computes them: QGemm's bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN
from internvl_edge.runtime.backends.products import use_exact_products
from internvl_edge.runtime.backends.tower import TOWER, tower_kernel
from internvl_edge.runtime.backends.tower_nodes import give_tower, takes_all_products

ROWS, INPUTS, COLUMNS = 5, 70, 40
PRODUCT = "IntegerProduct"
FUSED = "IntegerProductGeluRounded"
NAMES = ("x", "scale", "zero", "w", "ws", "wz", "bias")


@pytest.fixture
def kernel() -> OwnKernel:
    found = tower_kernel()
    if found.library is None or found.kind != TOWER:
        pytest.skip(str(found))
    return found


def weights(**changed: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """Return what a product is of, as it is written, but for what is changed or left out."""
    random = np.random.default_rng(1)
    made: dict[str, NDArray[Any] | None] = {
        "scale": np.array(0.03, np.float32),
        "zero": np.array(128, np.uint8),
        "w": random.integers(-127, 128, (COLUMNS, INPUTS), np.int8),
        "ws": random.uniform(0.001, 0.003, COLUMNS).astype(np.float32),
        "wz": np.zeros(COLUMNS, np.int8),
        "bias": random.integers(-1000, 1000, COLUMNS, np.int32),
        **changed,
    }
    return {name: array for name, array in made.items() if array is not None}


def qgemm(inputs: Sequence[str] = NAMES, output: str = "y", **attributes: float) -> onnx.NodeProto:
    attributes = {"transB": 1} | attributes
    return helper.make_node("QGemm", inputs, [output], output, None, MICROSOFT_DOMAIN, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto], stored: Mapping[str, NDArray[Any]], *outputs: str
) -> bytes:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [info("x", TensorProto.UINT8, ["rows", INPUTS])],
        [onnx.ValueInfoProto(name=name) for name in outputs or ("y",)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def operators(content: bytes) -> Counter[str]:
    changed = give_tower(content)
    assert changed is not None
    return Counter(one.op_type for one in onnx.load_from_string(changed).graph.node)


def opened(content: bytes, library: str | None) -> ort.InferenceSession:
    """Open a model of ONNX Runtime's operators, or of those of a library."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library is None:
        use_exact_products(options)
    else:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def computed(content: bytes, library: str | None = None) -> list[NDArray[Any]]:
    session = opened(content, library)
    x = np.random.default_rng(0).integers(0, 256, (ROWS, INPUTS), np.uint8)
    results: list[NDArray[Any]] = session.run(None, {"x": x})
    return results


def check_same(kernel: OwnKernel, content: bytes) -> None:
    """Check that our operators give the same bits."""
    changed = give_tower(content)
    assert changed is not None
    for got, wanted in zip(computed(changed, str(kernel.library)), computed(content), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("inputs", "changed"),
    [
        (NAMES, {}),
        (NAMES[:6], {"bias": None}),
        (NAMES, {"zero": np.array([3], np.uint8), "scale": np.array([0.5], np.float32)}),
        (NAMES, {"w": np.random.default_rng(2).choice([-128, 127], (40, 70)).astype(np.int8)}),
        ((*NAMES, "", ""), {}),
    ],
)
def test_the_same_bits_as_qgemm(
    inputs: Sequence[str], changed: dict[str, Any], kernel: OwnKernel
) -> None:
    content = model([qgemm(inputs)], weights(**changed))
    assert operators(content) == {PRODUCT: 1}
    assert takes_all_products(content)
    check_same(kernel, content)


@pytest.mark.parametrize(
    ("node", "changed"),
    [
        (qgemm(), {"w": np.zeros((COLUMNS, INPUTS), np.uint8), "wz": np.zeros(COLUMNS, np.uint8)}),
        (qgemm(), {"wz": np.ones(COLUMNS, np.int8)}),
        (qgemm(), {"ws": np.array(0.1, np.float32), "wz": np.array(0, np.int8)}),
        (qgemm(), {"bias": np.zeros(1, np.int32)}),
        (qgemm(), {"w": None}),
        (qgemm(), {"zero": np.array(0, np.int8)}),
        (qgemm(alpha=0.5), {}),
        (qgemm(transB=0), {"w": np.zeros((INPUTS, COLUMNS), np.int8)}),
        (qgemm(NAMES[:5]), {}),
        (qgemm((*NAMES, "scale", "zero")), {}),
    ],
)
def test_other_products_stay_onnx_runtimes(node: onnx.NodeProto, changed: dict[str, Any]) -> None:
    """One by one: what our operator computes beside it, it does."""
    ours = qgemm(("x", "scale2", "zero2", "w2", "ws2", "wz2", "bias2"), "y2")
    stored = weights(**changed) | {f"{name}2": array for name, array in weights().items()}
    content = model([node, ours], stored, "y", "y2")
    assert operators(content) == {"QGemm": 1, PRODUCT: 1}
    assert not takes_all_products(content)


def test_a_weights_zero_points_outside_of_the_graph_are_not_trusted() -> None:
    changed = onnx.load_from_string(model([qgemm()], weights()))
    for weight in changed.graph.initializer:
        if weight.name == "wz":
            weight.ClearField("raw_data")
            weight.data_location = TensorProto.EXTERNAL
            weight.external_data.add(key="location", value="some.data")
    assert operators(changed.SerializeToString()) == {"QGemm": 1}


def shared(*outputs: str) -> list[onnx.NodeProto]:
    """Return products that share their zero point, as older bundles have them."""
    return [qgemm(output=name) for name in outputs]


def test_products_that_share_their_zero_points(kernel: OwnKernel) -> None:
    content = model(shared("y", "y2"), weights(), "y", "y2")
    assert operators(content) == {PRODUCT: 2}
    check_same(kernel, content)


def activated(*parts: str, scale: str = "scale") -> list[onnx.NodeProto]:
    """Return GELU of products, rounded, and joined where there are several."""
    nodes = shared(*parts)
    for part in parts:
        nodes.append(helper.make_node("Gelu", [part], [f"{part}.g"]))
        given = [f"{part}.g", scale, "zero"]
        nodes.append(helper.make_node("QuantizeLinear", given, [f"{part}.r"]))
    joined = [f"{part}.r" for part in parts]
    if len(parts) > 1:
        return [*nodes, helper.make_node("Concat", joined, ["y"], axis=-1)]
    return [*nodes, helper.make_node("Identity", joined, ["y"])]


def test_gelu_and_rounding_are_the_products_own(kernel: OwnKernel) -> None:
    """The bits are those of our operators one after the other."""
    for parts in (["a"], ["a", "b"], [str(i) for i in range(8)]):
        content = model(activated(*parts), weights())
        alone = {"Identity": 1} if len(parts) == 1 else {}
        assert operators(content) == {FUSED: 1, **alone}
        apart = give_tower(content, products=False)
        assert apart is not None
        changed = onnx.load_from_string(apart)
        assert Counter(one.op_type for one in changed.graph.node)["GeluRounded"] == 1
        (got,), (wanted,) = (
            computed(give_tower(content, products=ours) or b"", str(kernel.library))
            for ours in (True, False)
        )
        assert got.dtype == np.uint8
        assert got.std() > 1
        np.testing.assert_array_equal(got, wanted)


def test_factors_of_runs(kernel: OwnKernel) -> None:
    nodes = shared("a", "b")
    for part in ("a", "b"):
        nodes.append(helper.make_node("Gelu", [part], [f"{part}.g"]))
        nodes.append(helper.make_node("Mul", [f"{part}.g", "factors"], [f"{part}.m"]))
        nodes.append(
            helper.make_node("QuantizeLinear", [f"{part}.m", "scale", "zero"], [f"{part}.r"])
        )
    nodes.append(helper.make_node("Concat", ["a.r", "b.r"], ["y"], axis=-1))
    factors = np.linspace(0.1, 3, COLUMNS).astype(np.float32)
    content = model(nodes, weights() | {"factors": factors})
    assert operators(content) == {FUSED: 1}
    got, wanted = (
        computed(give_tower(content, products=ours) or b"", str(kernel.library))[0]
        for ours in (True, False)
    )
    np.testing.assert_array_equal(got, wanted)


def test_what_others_take_too_is_not_fused() -> None:
    content = model(activated("a"), weights(), "y", "a")
    assert operators(content) == {PRODUCT: 1, "GeluRounded": 1, "Identity": 1}


def test_products_of_other_rows_are_not_fused() -> None:
    nodes = activated("a", "b")
    nodes[1] = qgemm(("x", "scale", "zero2", *NAMES[3:]), "b")
    content = model(nodes, weights() | {"zero2": np.array(0, np.uint8)})
    assert operators(content) == {PRODUCT: 2, "GeluRounded": 1}


def test_inputs_that_do_not_fit_are_refused(kernel: OwnKernel) -> None:
    """How many there are is known when it runs."""
    changed = onnx.load_from_string(give_tower(model([qgemm()], weights())) or b"")
    changed.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    session = opened(changed.SerializeToString(), str(kernel.library))
    with pytest.raises(Exception, match="x is not of the weight's inputs"):
        session.run(None, {"x": np.zeros((1, INPUTS + 1), np.uint8)})
    (nothing,) = session.run(None, {"x": np.zeros((0, INPUTS), np.uint8)})
    assert nothing.shape == (0, COLUMNS)
