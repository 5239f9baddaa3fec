"""Attention is given to our operator by the graph's bytes, whole or not at all."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from internvl_edge.bundle.contract import Tensor
from internvl_edge.runtime.backends.attention_nodes import (
    SEQUENCES,
    fields,
    give_attention,
    has_caches,
)
from internvl_edge.runtime.backends.own_nodes import MICROSOFT_DOMAIN, OWN_DOMAIN

#: As ONNX Runtime 1.31 saves them.
SAVED = {
    **{"smooth_softmax": -1, "causal": 1, "sliding_window_cache": 0, "local_window_size": -1},
    **{"qk_output": 0, "qk_norm_epsilon": 1e-6, "k_quant_type": "NONE", "v_quant_type": "NONE"},
}
PACKED, APART = ("qkv", "", ""), ("q", "k", "v")
TABLES, SCALES = ("rope.cos", "rope.sin"), ("", "", "", "key.scales", "value.scales")


def node(
    layer: int = 0,
    rows: tuple[str, str, str] = PACKED,
    beside: tuple[str, ...] = TABLES,
    op: str = "GroupQueryAttention",
    domain: str = MICROSOFT_DOMAIN,
    **changed: Any,
) -> onnx.NodeProto:
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": int(beside[:1] != ("",))}
    past, present = (
        [f"{time}.{layer}.{part}" for part in ("key", "value")] for time in ("past", "present")
    )
    given = [*rows, *past, "last_position", "total_length", *beside]
    outputs = [f"attended.{layer}", *present]
    return helper.make_node(op, given, outputs, f"n{layer}", domain=domain, **attributes, **changed)


def model(
    *nodes: onnx.NodeProto,
    dtype: int = TensorProto.FLOAT,
    cache: int | None = None,
    shape: tuple[int | str, ...] = (1, 2, "context", 8),
) -> bytes:
    """A language graph's attention; caches are of `dtype` unless told otherwise."""
    info = helper.make_tensor_value_info
    cache = dtype if cache is None else cache
    pasts = [name for one in nodes for name in one.input[3:5]]
    presents = [name for one in nodes for name in one.output[1:]]
    inputs = [
        *(info(name, dtype, ["n", 8]) for name in ("qkv", *TABLES)),
        info("last_position", TensorProto.INT32, [1]),
        info("total_length", TensorProto.INT32, []),
        *(info(name, cache, shape) for name in pasts),
    ]
    outputs = [info(name, cache, shape) for name in presents]
    outputs += [info(one.output[0], dtype, ["n", 8]) for one in nodes]
    graph = helper.make_graph(list(nodes), "GroupQueryAttention", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())


def changed(given_model: bytes) -> onnx.ModelProto:
    found = give_attention(given_model)
    assert found is not None
    return onnx.load_from_string(found)


@pytest.mark.parametrize("attributes", [{}, SAVED], ids=["exported", "saved"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_caches_leave_the_graph(dtype: int, attributes: dict[str, Any]) -> None:
    got = changed(model(node(0, **attributes), node(1, **attributes), dtype=dtype))
    name = "CachedAttention" if dtype == TensorProto.FLOAT else "CachedAttentionOfHalves"
    for layer, one in enumerate(got.graph.node):
        assert (one.op_type, one.domain) == (name, OWN_DOMAIN)
        assert list(one.input) == ["qkv", "", "", SEQUENCES, *TABLES]
        assert list(one.output) == [f"attended.{layer}"]
        assert {a.name: a.i for a in one.attribute} == {
            **{"num_heads": 4, "kv_num_heads": 2, "layer": layer, "head_size": 8}
        }
    assert [one.name for one in got.graph.input] == ["qkv", *TABLES, SEQUENCES]
    assert [one.name for one in got.graph.output] == ["attended.0", "attended.1"]
    sizes = got.graph.input[-1].type.tensor_type
    assert sizes.elem_type == TensorProto.INT64
    assert [dim.dim_value for dim in sizes.shape.dim] == [0, fields(2)]
    assert [one.domain for one in got.opset_import] == ["", MICROSOFT_DOMAIN, OWN_DOMAIN]


def test_what_is_rotated_before_keeps_the_total_length() -> None:
    before = helper.make_node("Identity", ["total_length"], ["total"])
    attends = node(0, APART, ("", ""))
    given_model = onnx.load_from_string(model(attends))
    given_model.graph.node.insert(0, before)
    got = changed(bytes(given_model.SerializeToString()))
    assert list(got.graph.node[1].input) == [*APART, SEQUENCES]
    assert "total_length" in [one.name for one in got.graph.input]
    assert "last_position" not in [one.name for one in got.graph.input]


def test_scales_of_the_cache_stay() -> None:
    attends = node(0, PACKED, (*TABLES, *SCALES), kv_cache_bit_width=8)
    got = changed(model(attends, cache=TensorProto.INT8))
    assert list(got.graph.node[0].input) == ["qkv", "", "", SEQUENCES, *TABLES, *SCALES[3:]]


@pytest.mark.parametrize(
    "other",
    [
        node(1),
        node(0, scale=0.5),
        node(0, softcap=2.0),
        node(0, causal=0),
        node(0, local_window_size=64),
        node(0, rotary_interleaved=1),
        node(0, kv_cache_bit_width=4),
        node(0, some_day=1),
        node(0, PACKED, (*TABLES, "positions")),
        node(0, PACKED, (*TABLES, "", "bias")),
        node(0, PACKED, (*TABLES, *SCALES, "q_norm")),
        node(0, op="Attention"),
        node(0, domain="another"),
    ],
    ids=lambda one: f"{one.op_type}{one.domain}{one.input[3:]}{[a.name for a in one.attribute]}",
)
def test_what_the_operator_does_not_know_is_left(other: onnx.NodeProto) -> None:
    assert give_attention(model(other)) is None


@pytest.mark.parametrize(
    "caches",
    [
        {"cache": TensorProto.INT8},
        {"cache": TensorProto.FLOAT16},
        {"shape": (1, 4, "context", 8)},
        {"shape": (2, 2, "context", 8)},
        {"shape": (1, 2, "context", "any")},
        {"shape": (1, 2, "context")},
    ],
    ids=str,
)
def test_caches_must_be_those_of_the_heads(caches: dict[str, Any]) -> None:
    """Else the operator would write beyond them."""
    assert give_attention(model(node(0), **caches)) is None


def test_caches_must_be_the_manifests() -> None:
    tensors = [
        Tensor(name, "float32", (1, 2, "context", 8))
        for name in ("past.0.key", "past.0.value", "present.0.key", "present.0.value")
    ]
    assert has_caches(model(node(0)), tensors)
    assert not has_caches(model(node(0), shape=(1, 1, "context", 8)), tensors)
    assert not has_caches(model(node(0), cache=TensorProto.FLOAT16), tensors)
    assert not has_caches(model(node(0), node(1))[:-3], tensors)
    assert not has_caches(model(), tensors)


def test_all_layers_or_none() -> None:
    assert give_attention(model(node(0), node(1, softcap=2.0))) is None
    assert give_attention(model(node(0), node(0))) is None
    assert give_attention(model(node(0), dtype=TensorProto.DOUBLE)) is None


@given(st.data())
def test_damaged_bytes_raise_nothing(data: st.DataObject) -> None:
    content = bytearray(model(node(0), node(1)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = give_attention(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found is None or OWN_DOMAIN.encode() in found


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing(content: bytes) -> None:
    assert give_attention(content) is None
