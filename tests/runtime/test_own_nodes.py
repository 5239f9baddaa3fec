"""Nodes are given to our operator by their bytes: the right ones, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.runtime.backends.own_nodes import OWN_DOMAIN, give_products, has_own_nodes

TAKEN = {"K": 64, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 4}

EXPERTS = {
    "k": 2,
    "expert_weight_bits": 4,
    "block_size": 32,
    "activation_type": "swiglu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_fusion": 1,
    "normalize_routing_weights": 1,
}


def node(
    *more: str, op: str = "MatMulNBits", domain: str = "com.microsoft", **changed: int
) -> onnx.NodeProto:
    attributes = {**TAKEN, **changed}
    return helper.make_node(op, ["x", "w", "s", *more], ["y"], "n", domain=domain, **attributes)


def model(*nodes: onnx.NodeProto) -> bytes:
    weight = numpy_helper.from_array(np.zeros((8, 2, 16), np.uint8), "w")
    info = helper.make_tensor_value_info
    inputs, outputs = (
        [info("x", TensorProto.FLOAT, [1, 64])],
        [info("y", TensorProto.FLOAT, [1, 8])],
    )
    graph = helper.make_graph(list(nodes), "MatMulNBits com.microsoft", inputs, outputs, [weight])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())


@pytest.mark.parametrize("inputs", [(), ("", "", "bias"), ("",), ("", "")])
def test_only_the_domain_changes(inputs: tuple[str, ...]) -> None:
    given_model = model(node(*inputs), node(bits=2), node(bits=8))
    changed = give_products(given_model)
    assert changed is not None
    got, wanted = onnx.load_from_string(changed), onnx.load_from_string(given_model)
    wanted.graph.node[0].domain = wanted.graph.node[2].domain = OWN_DOMAIN
    wanted.opset_import.append(helper.make_opsetid(OWN_DOMAIN, 1))
    assert got == wanted


def experts(*more: str, **changed: float | str) -> onnx.NodeProto:
    inputs = ["x", "r", "w", "s", "", "v", "t", *more]
    attributes = {**EXPERTS, **changed}
    return helper.make_node("QMoE", inputs, ["y"], "n", domain="com.microsoft", **attributes)


def test_experts_are_given_too() -> None:
    changed = give_products(model(node(), experts(), experts("", "")))
    assert changed is not None
    assert {one.domain for one in onnx.load_from_string(changed).graph.node} == {OWN_DOMAIN}


@pytest.mark.parametrize(
    "other",
    [
        experts("bias"),
        experts("", "w3"),
        experts(expert_weight_bits=2),
        experts(block_size=16),
        experts(swiglu_fusion=0),
        experts(swiglu_limit=7.0),
        experts(activation_alpha=1.702),
        experts(activation_beta=1.0),
        experts(activation_type="silu"),
        experts(normalize_routing_weights=0),
    ],
    ids=str,
)
def test_a_graph_with_other_experts_is_left(other: onnx.NodeProto) -> None:
    """Whole: what maps a graph's weights maps all of them."""
    assert give_products(model(node(), experts(), other)) is None


@pytest.mark.parametrize(
    "other",
    [
        node("zero_points"),
        node("", "g_idx"),
        node(bits=2),
        node(block_size=16),
        node(accuracy_level=0),
        node(op="MatMulNBitsMlp"),
        node(domain="another.domain"),
        node(domain=""),
    ],
    ids=lambda one: f"{one.input[3:]}{one.op_type}{one.domain}{one.attribute[2].i}",
)
def test_what_the_operator_does_not_take_is_left(other: onnx.NodeProto) -> None:
    assert give_products(model(other)) is None


def test_nodes_that_came_with_a_file_are_seen() -> None:
    """Whatever their nesting, and however their lengths are written; imports of a domain are none:
    ONNX Runtime saves those of all that it knows."""
    imported = onnx.load_from_string(model(node()))
    imported.opset_import.append(helper.make_opsetid(OWN_DOMAIN, 1))
    assert not has_own_nodes(imported.SerializeToString())
    inner = onnx.load_from_string(model(node(domain=OWN_DOMAIN))).graph
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    function = helper.make_function(
        "any", "f", ["x"], ["y"], [node(domain=OWN_DOMAIN)], [helper.make_opsetid("", 21)]
    )
    called = onnx.load_from_string(model(node()))
    called.functions.append(function)
    for given_model in (
        model(node(domain=OWN_DOMAIN)),
        model(branch),
        called.SerializeToString(),
        model(node(domain=OWN_DOMAIN)).replace(b"\x0dinternvl_edge", b"\x8d\x00internvl_edge"),
        b"no model",
    ):
        assert has_own_nodes(given_model)


@given(st.data())
def test_damaged_bytes_raise_nothing(data: st.DataObject) -> None:
    content = bytearray(model(node("", "", "bias"), node(bits=2)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = give_products(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert changed is None or OWN_DOMAIN.encode() in changed


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing(content: bytes) -> None:
    assert give_products(content) is None
