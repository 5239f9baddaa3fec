"""Graphs as bytes, against `onnx`: what is read is what it reads, and it reads what is written."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.runtime.backends.graph_bytes import Declared, Model, Node
from internvl_edge.runtime.backends.protocol_buffers import Message

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)
integers = st.integers(-(2**63), 2**63 - 1)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node(
            draw(names),
            draw(st.lists(st.one_of(st.just(""), names), max_size=4)),
            draw(st.lists(names, max_size=3)),
            draw(names),
            domain=draw(st.sampled_from(["", "com.microsoft"])),
            whole=draw(integers),
            real=0.5,
            many=[1, -2, 3],
            word="word",
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    shapes = st.lists(st.one_of(st.integers(0, 2**40), names), max_size=3)
    inputs = [info(name, TensorProto.FLOAT, draw(shapes)) for name in draw(st.lists(names))]
    weight = numpy_helper.from_array(np.arange(300, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, draw(names), inputs, [info("y", 1, ["n"])], [weight])
    return helper.make_model(graph)


@given(models())
def test_reading_is_what_onnx_reads(model: onnx.ModelProto) -> None:
    graph = Model.parse(model.SerializeToString()).graph
    assert graph.inputs == [one.name for one in model.graph.input]
    assert graph.outputs == ["y"]
    for node, wanted in zip(graph.nodes, model.graph.node, strict=True):
        assert (node.name, node.operator, node.domain) == (
            wanted.name,
            wanted.op_type,
            wanted.domain,
        )
        assert (node.inputs, node.outputs) == (list(wanted.input), list(wanted.output))
        whole = {one.name: one.i for one in wanted.attribute if one.HasField("i")}
        assert node.integers() == whole


@given(models())
def test_tensors_are_told_as_onnx_tells_them(model: onnx.ModelProto) -> None:
    said = Model.parse(model.SerializeToString()).graph.tensors()
    wanted = {}
    for one in [*model.graph.input, *model.graph.output]:
        kind = one.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        wanted[one.name] = Declared(kind.elem_type, tuple(sizes))
    assert said == wanted


@given(models())
def test_what_is_read_is_written_again(model: onnx.ModelProto) -> None:
    content = model.SerializeToString()
    parsed = Model.parse(content)
    for node in parsed.graph.nodes:
        node.integers()
    assert parsed.serialised() == content


@given(models(), names, st.lists(st.one_of(st.integers(0, 2**40), names), max_size=4), st.data())
def test_changes_are_those_that_onnx_makes(
    model: onnx.ModelProto, name: str, shape: list[int | str], data: st.DataObject
) -> None:
    changed = Model.parse(model.SerializeToString())
    changed.import_domain("ours")
    model.opset_import.append(helper.make_opsetid("ours", 1))
    dropped = data.draw(st.sets(st.sampled_from([one.name for one in model.graph.input] + ["z"])))
    changed.graph.drop(dropped)
    for tensors in (model.graph.input, model.graph.output):
        kept = [one for one in tensors if one.name not in dropped]
        del tensors[:]
        tensors.extend(kept)
    changed.graph.add_input(name, TensorProto.INT64, shape)
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    for node, wanted in zip(changed.graph.nodes, model.graph.node, strict=True):
        node.operator, node.domain = "Other", "ours"
        node.inputs, node.outputs = [*node.inputs[1:], name], [name]
        node.keep_attributes(["whole", "word"])
        node.set_integer("more", 7)
        wanted.op_type, wanted.domain = "Other", "ours"
        inputs = [*wanted.input[1:], name]
        del wanted.input[:], wanted.output[:]
        wanted.input.extend(inputs)
        wanted.output.append(name)
        attributes = [one for one in wanted.attribute if one.name in ("whole", "word")]
        del wanted.attribute[:]
        wanted.attribute.extend([*attributes, helper.make_attribute("more", 7)])
    assert onnx.load_from_string(changed.serialised()) == model


def test_what_is_added_is_what_onnx_would_write() -> None:
    info, values = helper.make_tensor_value_info, [-1, 300, 2**40]
    wanted = helper.make_graph(
        [helper.make_node("Concat", ["a", "b"], ["joined"], "joined", axis=0)],
        "added",
        [info("a", TensorProto.FLOAT, ["rows", 2]), info("b", TensorProto.FLOAT, [1, 2])],
        [info("joined", TensorProto.FLOAT, ["rows", 2])],
        [numpy_helper.from_array(np.array(values), "w")],
    )
    given_graph = helper.make_graph([], "added", [*wanted.input], [*wanted.output])
    for one in (*given_graph.input, *given_graph.output):
        one.type.tensor_type.shape.dim[0].dim_value = 1
    changed = Model.parse(helper.make_model(given_graph).SerializeToString())
    node = Node.made("Concat", ["a", "b"], "joined")
    node.set_integer("axis", 0)
    changed.graph.nodes = [node]
    changed.graph.add_weight("w", values)
    changed.graph.name_size(["a", "joined", "other"], 0, "rows")
    assert onnx.load_from_string(changed.serialised()).graph == wanted
    assert not changed.graph.describes_values
    given_graph.value_info.append(info("between", TensorProto.FLOAT, [1]))
    given_bytes = helper.make_model(given_graph).SerializeToString()
    assert Model.parse(given_bytes).graph.describes_values


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(content: bytes) -> None:
    try:
        parsed = Message.parse(content)
    except (IndexError, ValueError):
        return
    assert Message.parse(parsed.serialised()) == parsed


def test_weights_are_told_as_onnx_tells_them() -> None:
    arrays = {
        "matrix": np.arange(6, dtype=np.int8).reshape(2, 3),
        "single": np.array(0.5, np.float32),
        "wide": np.zeros((1, 300), np.uint8),
    }
    made = helper.make_graph(
        [],
        "weights",
        [],
        [],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    told = Model.parse(helper.make_model(made).SerializeToString()).graph.weights()
    assert told.keys() == arrays.keys()
    for name, array in arrays.items():
        wanted = helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes()
        assert (told[name].element, told[name].shape, told[name].content) == wanted


def test_numbers_that_are_packed() -> None:
    """As proto3 writes what is repeated; ONNX writes each by itself."""
    assert list(Message.parse(bytes([10, 3, 3, 172, 2, 8, 5])).numbers(1)) == [3, 300, 5]
