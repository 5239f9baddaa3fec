"""A graph in parts gives what it gives whole, bit for bit, and the parts are about equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrating import few_items
from checkpoints import small_config, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_GRAPH
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.prepare.cut import cut_graph
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import prepared as prepared_module
from internvl_edge.runtime.backends.chain import Chain
from internvl_edge.runtime.backends.prepared import find_prepared, part_count, part_names

WIDTH = 8
LAYERS = 4


def layers_of(widths: list[int]) -> onnx.ModelProto:
    """A residual network: x + w2 w1 x, the inner width another one in each layer."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], {}, "x"
    for i, inner in enumerate(widths):
        name = f"/layers.{i}/"
        for matrix, shape in (("w1", (WIDTH, inner)), ("w2", (inner, WIDTH))):
            weights[f"{i}.{matrix}"] = rng.standard_normal(shape).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [x, f"{i}.w1"], [f"{name}wide"], f"{name}w1"),
            helper.make_node("Tanh", [f"{name}wide"], [f"{name}bent"], f"{name}tanh"),
            helper.make_node("MatMul", [f"{name}bent", f"{i}.w2"], [f"{name}out"], f"{name}w2"),
            helper.make_node("Add", [x, f"{name}out"], [f"{name}x"], f"{name}add"),
        ]
        x = f"{name}x"
    nodes.append(helper.make_node("Mul", [x, "scale"], ["y"], "/end"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "layers",
        [value("x", TensorProto.FLOAT, ["rows", WIDTH]), value("scale", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, ["rows", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def weight_bytes(model: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.data())
def test_parts_run_as_the_whole(widths: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(widths)))
    model = layers_of(widths)
    parts = cut_graph(model, count)
    assert [n for part in parts for n in part.graph.node] == list(model.graph.node)
    assert all(weight_bytes(part) for part in parts)
    assert sum(map(weight_bytes, parts)) == weight_bytes(model)
    # A cut is at the layer's boundary next to the even place, where layers are left for others.
    if count <= 2 and len(widths) > 1:
        assert max(map(weight_bytes, parts)) <= weight_bytes(model) / count + 32 * max(widths)
    chain = Chain([session(part) for part in parts])
    assert {node.name for node in chain.get_inputs()} == {"x", "scale"}
    assert [node.name for node in chain.get_outputs()] == ["y"]
    whole, binding = session(model), chain.binding()
    binding.bind_cpu_input("scale", np.array([0.5], np.float32))
    for rows in (3, 1, 1, 5):
        x = np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)
        feeds = {"x": x, "scale": np.array([0.5], np.float32)}
        (wanted,) = whole.run(["y"], feeds)
        y = np.full_like(wanted, np.nan)
        binding.bind_cpu_input("x", x)
        binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
        binding.run(rows)
        np.testing.assert_array_equal(y, wanted)


@pytest.fixture(scope="module", params=["fp32-fp32", "int8-int4", "int8-int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    config = small_config(
        hidden=256, vision_hidden=128, heads=8, kv_heads=2, layers=LAYERS, vision_layers=LAYERS
    )
    vision, language = request.param.split("-")
    with few_items():
        return export_bundle(
            write_checkpoint(folder / "checkpoint", config),
            folder / "bundle",
            vision=vision,
            language=language,
            options=QuantOptions(naive=True, block=32),
            sensitivity=False,
        )


@pytest.mark.parametrize("count", [2, 3, LAYERS])
def test_a_conversation_through_parts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (56, 112, 3), np.uint8)

    def answers(low_memory: bool) -> tuple[list[list[int]], InternVL]:
        model = InternVL.load(bundle, device="cpu", threads=1, low_memory=low_memory, reuse_bytes=0)
        chat, other = model.chat(), model.chat()
        replies = [
            chat.send("What is it?", [picture], max_new_tokens=6),
            other.send("And without?", max_new_tokens=4),
            chat.send("Larger?", max_new_tokens=6),
        ]
        return [reply.token_ids for reply in replies], model

    wanted, whole = answers(False)
    manifest = open_bundle(bundle).manifest
    most = max(manifest.files[f"{part}.data"].bytes for part in ("vision", "language"))
    monkeypatch.setattr(prepared_module, "PART_BYTES", most // count + 65536)
    folder = prepare_bundle(bundle, overwrite=True)
    counts = [part_count(manifest, graph) for graph in (VISION_GRAPH, LANGUAGE_GRAPH)]
    assert max(counts) == count
    for graph, parts in zip((VISION_GRAPH, LANGUAGE_GRAPH), counts, strict=True):
        stem = graph.removesuffix(".onnx")
        assert len(list(folder.glob(f"{stem}*.onnx"))) == len(part_names(graph, parts)) == parts
    got, cut = answers(False)
    assert got == wanted
    assert answers(True)[0] == wanted
    np.testing.assert_array_equal(cut.encode_images([picture]), whole.encode_images([picture]))
    ids = [1, 5, 9, 200, 17, 3]
    np.testing.assert_array_equal(cut.logits(ids), whole.logits(ids))


def test_parts_of_another_size_are_not_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_bundle(bundle, overwrite=True)
    monkeypatch.setattr(prepared_module, "PART_BYTES", 1 << 20)
    assert find_prepared(open_bundle(bundle)) is None


def test_part_names_and_counts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert part_names(LANGUAGE_GRAPH, 1) == ["language.onnx"]
    assert part_names(LANGUAGE_GRAPH, 3) == ["language.onnx", "language.1.onnx", "language.2.onnx"]
    manifest = open_bundle(bundle).manifest
    monkeypatch.setattr(prepared_module, "PART_BYTES", 1)
    assert part_count(manifest, LANGUAGE_GRAPH) == LAYERS
    embeddings = dataclasses.replace(manifest.spec.vision, select_layer=0)
    spec = dataclasses.replace(manifest.spec, vision=embeddings)
    assert part_count(dataclasses.replace(manifest, spec=spec), VISION_GRAPH) == 1
