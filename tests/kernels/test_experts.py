"""Layers of experts by our operator, beside ONNX Runtime's and NumPy; on CPUs we do not have, by
emulation; and memory's bounds."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from elsewhere import SANITIZED, compiled, on_aarch64, on_x86
from expert_cases import Experts, check, layer, layers
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.runtime.backends.blocks import BLOCKS, EXPERTS_PROBE
from internvl_edge.runtime.backends.own_kernel import OwnKernel, own_kernel

RUNNER = Path(__file__).with_name("experts_runner.cpp")


@pytest.fixture(scope="module")
def kernel() -> OwnKernel:
    if (found := own_kernel(BLOCKS)).library is None:
        pytest.skip(found.name)
    return found


def write_graph(given: Experts, path: Path) -> Path:
    """Write a graph of one layer, as export does."""
    _, hidden, _, experts, _, block, _ = given.shape
    weights = {
        "gated": given.gated[0].reshape(*given.gated[0].shape[:2], -1),
        "gated.scales": given.gated[1],
        "down": given.down[0].reshape(*given.down[0].shape[:2], -1),
        "down.scales": given.down[1],
    }
    node = helper.make_node(
        "QMoE",
        ["x", "logits", "gated", "gated.scales", "", "down", "down.scales"],
        ["y"],
        domain="com.microsoft",
        k=given.chosen,
        activation_type="swiglu",
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_fusion=1,
        normalize_routing_weights=1,
        expert_weight_bits=given.bits,
        block_size=block,
    )
    floats = TensorProto.FLOAT
    x, logits, y = (
        helper.make_tensor_value_info(name, floats, ["rows", width])
        for name, width in (("x", hidden), ("logits", experts), ("y", hidden))
    )
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "experts", [x, logits], [y], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def ours(kernel: OwnKernel, path: Path, threads: int = 3) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(kernel.give(path, options), options)


def mixed(session: ort.InferenceSession, given: Experts) -> NDArray[np.float32]:
    (y,) = session.run(None, {"x": given.x, "logits": given.logits})
    return np.asarray(y)


@pytest.mark.parametrize("given", layers(), ids=lambda one: str(one.shape))
def test_it_is_what_the_definition_says(given: Experts, kernel: OwnKernel, tmp_path: Path) -> None:
    path = write_graph(given, tmp_path / "graph.onnx")
    got = mixed(ours(kernel, path), given)
    check(got, given)
    # Of four bits, ONNX Runtime's rounds no inputs: 35 dB, as of all products of ours.
    theirs = mixed(ort.InferenceSession(path), given)
    assert not np.array_equal(got, theirs)  # else it was not our operator
    assert np.linalg.norm(got - theirs) < 0.03 * np.linalg.norm(theirs)


def test_a_row_is_as_it_is_alone(kernel: OwnKernel, tmp_path: Path) -> None:
    """By the bit, where no expert has more than a few rows."""
    given = layer(4, 256, 128, 8, 3, 128, 4)
    session = ours(kernel, write_graph(given, tmp_path / "graph.onnx"))
    together = mixed(session, given)
    for row in range(4):
        some = {"x": given.x[row : row + 1], "logits": given.logits[row : row + 1]}
        np.testing.assert_array_equal(session.run(None, some)[0][0], together[row])
    none = {"x": given.x[:0], "logits": given.logits[:0]}
    assert session.run(None, none)[0].shape == (0, 256)


def test_of_equal_experts_the_first_are_chosen(kernel: OwnKernel, tmp_path: Path) -> None:
    given = layer(20, 64, 32, 6, 3, 32, 4)
    given = replace(given, logits=given.logits.round())
    assert len(np.unique(given.logits)) < 8
    check(mixed(ours(kernel, write_graph(given, tmp_path / "graph.onnx")), given), given)


@pytest.mark.parametrize("name", ["x", "logits"])
def test_what_is_no_number_stays_one(name: str, kernel: OwnKernel, tmp_path: Path) -> None:
    """In its row, and nowhere else."""
    given = layer(6, 64, 32, 4, 2, 32, 4)
    session = ours(kernel, write_graph(given, tmp_path / "graph.onnx"))
    right, fed = mixed(session, given), {"x": given.x.copy(), "logits": given.logits.copy()}
    for row, value in ((1, np.nan), (4, np.inf)):
        fed[name][row, 3] = value
    (got,) = session.run(None, fed)
    assert np.isnan(got[[1, 4]]).all()
    kept = [0, 2, 3, 5]
    np.testing.assert_array_equal(got[kept], right[kept])


@pytest.mark.parametrize(
    "changed",
    [{"k": 9}, {"block_size": 64}, {"expert_weight_bits": 8}, {"k": 0}],
    ids=str,
)
def test_a_node_that_its_weights_do_not_fit_is_refused(
    changed: dict[str, int], kernel: OwnKernel, tmp_path: Path
) -> None:
    given = layer(2, 64, 32, 4, 2, 32, 4)
    path = write_graph(given, tmp_path / "graph.onnx")
    model = onnx.load(path)
    for attribute in model.graph.node[0].attribute:
        if attribute.name in changed:
            attribute.i = changed[attribute.name]
    onnx.save(model, path)
    with pytest.raises(Exception, match=r"experts|weights|k at least 1"):  # ONNX Runtime's
        mixed(ours(kernel, path), given)


def test_a_probe_that_gives_something_else_is_seen(kernel: OwnKernel, tmp_path: Path) -> None:
    """What is stored beside is far from what other shares would give."""
    model = onnx.load(EXPERTS_PROBE)
    (node,) = (one for one in model.graph.node if one.op_type == "QMoE")
    next(one for one in node.attribute if one.name == "k").i = 1
    onnx.save(model, tmp_path / "probe.onnx")
    x = np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)
    got, wanted = kernel.open_probe(tmp_path / "probe.onnx").run(None, {"x": x})
    assert np.linalg.norm(got - wanted) > 0.2 * np.linalg.norm(wanted)


def run(command: list[str], given: list[Experts]) -> tuple[list[str], list[NDArray[np.float32]]]:
    """Return the names of the paths, and of each layer the result of each path."""
    content = b"".join(
        np.array(one.shape, np.int64).tobytes()
        + b"".join(part.tobytes() for part in (one.x, one.logits, *one.gated, *one.down))
        for one in given
    )
    done = subprocess.run(command, input=content, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    line, _, rest = done.stdout.partition(b"\n")
    paths, floats, at, results = line.decode().split(","), np.frombuffer(rest, np.float32), 0, []
    for one in given:
        size = len(paths) * one.x.size
        results.append(floats[at : at + size].reshape(len(paths), *one.x.shape))
        at += size
    assert at == len(floats)
    return paths, results


def check_all(results: list[NDArray[np.float32]]) -> None:
    for given, each in zip(layers(), results, strict=True):
        for got in each:
            check(got, given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"), [("Haswell", ["AVX2", "plain"]), ("Nehalem", ["plain"])]
)
def test_on_other_x86(model: str, wanted: list[str], tmp_path: Path) -> None:
    paths, results = run(on_x86(model, RUNNER, "blocks", tmp_path), layers())
    assert paths == wanted
    check_all(results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"),
    [("max", ["NEON matrix products", "NEON dot products", "plain"]), ("cortex-a53", ["plain"])],
)
def test_on_aarch64(model: str, wanted: list[str], tmp_path: Path) -> None:
    paths, results = run(on_aarch64(model, RUNNER, "blocks", tmp_path), layers())
    assert paths == wanted
    check_all(results)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("g++", RUNNER, "blocks", tmp_path_factory.mktemp("sanitized"), *SANITIZED)


@pytest.mark.slow(seconds=20)
def test_nothing_outside_is_read_or_written(sanitized: Path) -> None:
    check_all(run([str(sanitized)], layers())[1])


@pytest.mark.slow
@pytest.mark.parametrize("short", ["x", "logits", "gated", "down"])
def test_an_array_that_is_too_short_is_seen(short: str, sanitized: Path) -> None:
    """Else the test above would pass with anything."""
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run([str(sanitized), short], [layer(3, 64, 32, 4, 4, 32, 4)])
