"""The nodes of an INT8 tower are given to our operators: which, in how few, and what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.runtime.backends.graph_bytes import Model
from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN, OWN_DOMAIN
from internvl_edge.runtime.backends.tower import probe_file
from internvl_edge.runtime.backends.tower_nodes import give_tower

Operator = tuple[str, str]


def node(
    operator: str, inputs: Sequence[str], output: str | Sequence[str], domain: str = "", **more: Any
) -> onnx.NodeProto:
    outputs = [output] if isinstance(output, str) else output
    return helper.make_node(
        operator, inputs, outputs, f"{operator}.{outputs[0]}", domain=domain, **more
    )


QGEMM = node("QGemm", ["a", "b"], "product", MICROSOFT_DOMAIN)
GELU, ROUND = node("Gelu", ["x"], "g"), node("QuantizeLinear", ["g", "scale", "zero"], "y")
NORM = node("LayerNormalization", ["x", "w", "b"], "n", axis=-1, epsilon=1e-5)
ADD = node("Add", ["p", "q"], "x")
MAKERS = [node("Identity", ["x0"], "p"), node("Identity", ["x0"], "q")]


def model(*nodes: onnx.NodeProto, outputs: Sequence[str] = ()) -> bytes:
    weights = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("w", "b", "f")]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [QGEMM, *nodes],
        "tower",
        [info("x0", TensorProto.FLOAT, [1, 4])],
        [info(name, TensorProto.FLOAT, [1, 4]) for name in outputs],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())


def given_nodes(content: bytes) -> list[onnx.NodeProto]:
    """Return the nodes of a changed model but for its integer product."""
    changed = give_tower(content)
    assert changed is not None
    return list(onnx.load_from_string(changed).graph.node)[1:]


def operators(nodes: Sequence[onnx.NodeProto]) -> Counter[Operator]:
    return Counter((one.domain, one.op_type) for one in nodes)


@pytest.mark.parametrize("products", [False, True])
def test_every_operation_of_a_tower_is_ours(products: bool) -> None:
    changed = give_tower(probe_file().read_bytes(), products=products)
    assert changed is not None
    found = operators(onnx.load_from_string(changed).graph.node)
    wanted = {
        (OWN_DOMAIN, "FloatProduct"): 3,
        (OWN_DOMAIN, "NormRounded"): 1,
        (OWN_DOMAIN, "IntegerAttentionRounded"): 1,
        (OWN_DOMAIN, "AddNormRounded"): 1,
        (OWN_DOMAIN, "AddNorm"): 1,
        (OWN_DOMAIN, "Gelu"): 1,
        ("", "Reshape"): 4,
        ("", "Identity"): 1,
    }
    if products:
        wanted |= {
            (OWN_DOMAIN, "IntegerProduct"): 5,
            (OWN_DOMAIN, "IntegerProductGeluRounded"): 1,
        }
    else:
        wanted |= {(MICROSOFT_DOMAIN, "QGemm"): 6, (OWN_DOMAIN, "GeluRounded"): 1}
    assert found == wanted


def test_a_graph_without_integer_products_is_left() -> None:
    content = onnx.load_from_string(model(GELU, outputs=["g"]))
    del content.graph.node[0]
    assert give_tower(content.SerializeToString()) is None


def test_what_is_not_only_rounded_is_not_fused() -> None:
    for nodes, outputs in (
        ([GELU, ROUND], ["y", "g"]),
        ([GELU, ROUND, node("Identity", ["g"], "z")], ["y", "z"]),
    ):
        got = given_nodes(model(*nodes, outputs=outputs))
        assert [one.op_type for one in got[:2]] == ["Gelu", "QuantizeLinear"]
        assert got[0].domain == OWN_DOMAIN


def test_factors_are_fused_where_they_are_weights() -> None:
    rounds = node("QuantizeLinear", ["m", "scale", "zero"], "y")
    got = given_nodes(model(GELU, node("Mul", ["g", "f"], "m"), rounds, outputs=["y"]))
    assert [one.op_type for one in got] == ["GeluRounded"]
    assert list(got[0].input) == ["scale", "zero", "x", *[""] * 7, "f"]
    computed = [*MAKERS, GELU, node("Mul", ["g", "p"], "m"), rounds]
    assert operators(given_nodes(model(*computed, outputs=["y"])))["", "Mul"] == 1


def runs(scales: Sequence[str]) -> list[onnx.NodeProto]:
    nodes = []
    for i, scale in enumerate(scales):
        nodes.append(node("Gelu", [f"x{i}"], f"g{i}"))
        nodes.append(node("QuantizeLinear", [f"g{i}", scale, "zero"], f"y{i}"))
    names = [f"y{i}" for i in range(len(scales))]
    return [*nodes, node("Concat", names, "y", axis=-1)]


def test_runs_of_columns_become_one() -> None:
    (got,) = given_nodes(model(*runs(["scale"] * 3), outputs=["y"]))
    assert (got.op_type, list(got.output)) == ("GeluRounded", ["y"])
    assert list(got.input) == ["scale", "zero", "x0", "x1", "x2"]


@pytest.mark.parametrize("scales", [["scale", "other"], ["scale"] * 9])
def test_runs_that_differ_or_are_many_are_joined_as_they_were(scales: list[str]) -> None:
    got = operators(given_nodes(model(*runs(scales), outputs=["y"])))
    assert got == {(OWN_DOMAIN, "GeluRounded"): len(scales), ("", "Concat"): 1}


def test_a_sum_is_fused_and_kept() -> None:
    (*_, got) = given_nodes(model(*MAKERS, ADD, NORM, outputs=["n", "x"]))
    assert (got.op_type, list(got.input)) == ("AddNorm", ["p", "q", "w", "b"])
    assert list(got.output) == ["n", "x"]


def test_a_sum_with_a_weight_is_left() -> None:
    """It may have another shape than what it is added to."""
    nodes = [MAKERS[0], node("Add", ["p", "w"], "x"), NORM]
    found = operators(given_nodes(model(*nodes, outputs=["n"])))
    assert found == {("", "Identity"): 1, ("", "Add"): 1, (OWN_DOMAIN, "Norm"): 1}


@pytest.mark.parametrize(
    "other",
    [
        node("LayerNormalization", ["x", "w", "b"], "n", axis=0, epsilon=1e-5),
        node("LayerNormalization", ["x", "w", "b"], ["n", "mean"], epsilon=1e-5),
        node(
            "SkipLayerNormalization", ["p", "x", "w", "b", "f"], "n", MICROSOFT_DOMAIN, epsilon=1.0
        ),
        node("Gelu", ["x"], "n", approximate="tanh"),
        node("Gemm", ["x", "w"], "n"),
        node("Gemm", ["x", "w"], "n", transB=1, alpha=0.5),
        node("MultiHeadAttention", ["x", "k", "v", "b"], "n", MICROSOFT_DOMAIN, num_heads=2),
        node("MultiHeadAttention", ["x", "k", "v"], "n", MICROSOFT_DOMAIN, num_heads=2, scale=0.5),
        node("Gelu", ["x"], "n", "another.domain"),
    ],
    ids=lambda one: f"{one.op_type}{len(one.input)}{len(one.attribute)}{one.domain}",
)
def test_what_our_operators_do_not_take_is_left(other: onnx.NodeProto) -> None:
    assert given_nodes(model(other, outputs=list(other.output))) == [other]


@given(st.data())
def test_damaged_bytes_raise_nothing(data: st.DataObject) -> None:
    content = bytearray(model(*MAKERS, ADD, NORM, *runs(["scale"] * 2), outputs=["n", "y"]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = give_tower(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert changed is None or OWN_DOMAIN.encode() in changed


def test_floats_and_texts_are_what_onnx_reads() -> None:
    made = node("Gelu", ["x"], "y", alpha=0.25, approximate="tanh", whole=3)
    (read,) = Model.parse(model(made)).graph.nodes[1:]
    assert (read.floats(), read.strings()) == ({"alpha": 0.25}, {"approximate": "tanh"})
    read.set_float("alpha", -1.5)
    changed = onnx.NodeProto.FromString(read.serialised())
    values = {one.name: helper.get_attribute_value(one) for one in changed.attribute}
    assert values == {"alpha": -1.5, "approximate": b"tanh", "whole": 3}
