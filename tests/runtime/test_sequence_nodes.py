"""An axis of sequences is given to a language graph by its bytes, whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.formats.plan import CacheScales
from internvl_edge.export.graphs.dialects.probes import attention_graph
from internvl_edge.runtime.backends import int8_cache
from internvl_edge.runtime.backends.sequence_nodes import give_sequences

SPEC = replace(
    int8_cache.SPEC,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_size=32,
    max_position_embeddings=160,
)
#: Positions cached of each sequence.
CACHED = (0, 33, 5, 130)


def attention(cache: CachePrecision = "fp32", spec: LanguageSpec = SPEC) -> onnx.ModelProto:
    shape = spec.num_key_value_heads, spec.head_dim
    scales = np.random.default_rng(1).uniform(0.01, 0.03, (2, *shape)).astype(np.float32)
    return attention_graph(spec, cache, CacheScales(*scales))


@functools.cache
def stored_attention() -> bytes:
    return bytes(attention().SerializeToString())


def run(
    model: bytes, qkv: NDArray[Any], cached: tuple[int, ...], caches: list[NDArray[Any]]
) -> NDArray[Any]:
    """Rows behind what is cached, `(sequences * each, width)`; caches grow where they are."""
    last = np.array(cached, np.int32) + len(qkv) // len(cached) - 1
    context = SPEC.max_position_embeddings
    angles = np.random.default_rng(2).uniform(-4, 4, (context, SPEC.head_dim // 2))
    kind = "float16" if caches[0].dtype == np.float16 else "float32"
    feeds = {
        int8_cache.QKV: qkv,
        contract.ROPE_COS: np.cos(angles).astype(kind),
        contract.ROPE_SIN: np.sin(angles).astype(kind),
        contract.LAST_POSITION: last,
        contract.TOTAL_LENGTH: last.max() + np.int32(1),
    }
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, values in feeds.items():
        binding.bind_cpu_input(name, np.asarray(values))
    names = (contract.past_key(0), int8_cache.KEY), (contract.past_value(0), int8_cache.VALUE)
    for (past, present), own in zip(names, caches, strict=True):
        value = ort.OrtValue.ortvalue_from_numpy(own)
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)
    binding.bind_output(int8_cache.ATTENDED)
    session.run_with_iobinding(binding)
    return np.asarray(binding.get_outputs()[-1].numpy())


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_each_of_a_batch_is_what_it_is_alone(cache: CachePrecision) -> None:
    """The same operator over the same numbers: equal to the bit, and so are the caches."""
    if cache == "int8" and not int8_cache.takes_int8_cache():
        pytest.skip("this onnxruntime has no int8 cache")
    stored = bytes(attention(cache).SerializeToString())
    changed = give_sequences(stored)
    assert changed is not None
    random = np.random.default_rng(3)
    shape = contract.cache_shape(SPEC, SPEC.max_position_embeddings, len(CACHED))
    scale = 30 if cache == "int8" else 1
    one_by_one = [
        (random.standard_normal(shape) * scale).astype(contract.CACHE_DTYPE[cache])
        for _ in range(2)
    ]
    together = [own.copy() for own in one_by_one]
    width = SPEC.query_size + 2 * SPEC.key_value_size
    for step in range(2):
        qkv = random.standard_normal((len(CACHED), width)).astype(np.float32)
        cached = tuple(length + step for length in CACHED)
        wanted = [
            run(stored, qkv[i : i + 1], cached[i : i + 1], [own[i : i + 1] for own in one_by_one])
            for i in range(len(CACHED))
        ]
        got = run(changed, qkv, cached, together)
        np.testing.assert_array_equal(got, np.concatenate(wanted))
        np.testing.assert_array_equal(together, one_by_one)


def test_a_prompt_of_one_sequence_is_what_it_was() -> None:
    stored = bytes(attention().SerializeToString())
    changed = give_sequences(stored)
    assert changed is not None
    shape = contract.cache_shape(SPEC, SPEC.max_position_embeddings)
    width = SPEC.query_size + 2 * SPEC.key_value_size
    qkv = np.random.default_rng(4).standard_normal((7, width)).astype(np.float32)
    pairs = [[np.ones(shape, np.float32) for _ in range(2)] for _ in range(2)]
    wanted, got = (
        run(one, qkv, (11,), pair) for one, pair in zip((stored, changed), pairs, strict=True)
    )
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(*pairs)


def described(model: onnx.ModelProto) -> None:
    model.graph.value_info.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, [1]))


def named(model: onnx.ModelProto) -> None:
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "sequences.rows.256"


def placed(index: int, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        attends(model).input[index] = name

    return change


def also_taken(name: Callable[[onnx.NodeProto], str]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Identity", [name(attends(model))], ["more"]))

    return change


def other(index: int, operator: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[index]
        node.op_type, node.domain = operator, domain

    return change


def second_axis(model: onnx.ModelProto) -> None:
    for weight in model.graph.initializer:
        if weight.dims == [1]:
            weight.raw_data = np.array([1]).tobytes()


def attends(model: onnx.ModelProto) -> onnx.NodeProto:
    (found,) = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    return found


@pytest.mark.parametrize(
    "change",
    [
        described,
        named,
        second_axis,
        placed(5, "total_length"),
        placed(7, "rope.sin"),
        placed(3, "another"),
        other(0, "Reshape"),
        other(0, "Unsqueeze", "another"),
        other(1, "Attention"),
        other(2, "Reshape"),
        also_taken(lambda node: node.input[0]),
        also_taken(lambda node: node.output[0]),
        also_taken(lambda node: "total_length"),
    ],
)
def test_what_is_not_as_exported_is_left(change: Callable[[onnx.ModelProto], None]) -> None:
    model = attention()
    assert [node.op_type for node in model.graph.node] == [
        "Unsqueeze",
        "GroupQueryAttention",
        "Squeeze",
    ]
    assert give_sequences(model.SerializeToString()) is not None
    change(model)
    assert give_sequences(model.SerializeToString()) is None


def test_heads_that_are_rotated_before_are_of_one_sequence() -> None:
    """Their rows of the tables are those of neighbouring positions."""
    model = attention(spec=replace(SPEC, head_size=40))
    assert give_sequences(model.SerializeToString()) is None


@given(st.data())
def test_damaged_bytes_raise_nothing(data: st.DataObject) -> None:
    content = bytearray(stored_attention())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = give_sequences(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found is None or contract.BATCH.encode() in found


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing(content: bytes) -> None:
    assert give_sequences(content) is None
