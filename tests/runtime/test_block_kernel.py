"""Bundles with weights in blocks on our kernel: what MatMulNBits gives, from mapped weights; where
it is not, MatMulNBits itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrating import few_items
from checkpoints import GOLDEN, small_config, write_checkpoint
from sessions import cpu_session

from internvl_edge.bundle.contract import LANGUAGE_GRAPH, VISION_FILES, Tensor
from internvl_edge.bundle.manifest import Manifest, open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan, QuantPlan
from internvl_edge.export.formats.quantize import BlockFormat
from internvl_edge.export.graphs.dialects.onnxruntime import OnnxRuntimeDialect
from internvl_edge.export.graphs.graph import GraphBuilder
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.kernels.blocks.library import BLOCKS
from internvl_edge.runtime import InternVL, PreparedWarning
from internvl_edge.runtime.backends import blocks, own_kernel, own_kernels, sessions
from internvl_edge.runtime.backends.blocks import BLOCKS as KIND
from internvl_edge.runtime.backends.blocks import NO_KERNEL, PROBES, bundle_kernel
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.own_kernels import NO_KERNELS
from internvl_edge.runtime.backends.prepared import find_prepared
from internvl_edge.runtime.backends.products import Product, probe_file
from internvl_edge.runtime.memory import PACKED_GROWTH, plan_memory

IDS = [1, 5, 9, 200, 17, 3]


@pytest.fixture(scope="module", params=["int4", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with few_items():
        return export_bundle(
            GOLDEN / "model", tmp_path_factory.mktemp("blocks") / "bundle", language=request.param
        )


@pytest.fixture
def kernel() -> OwnKernel:
    if (found := own_kernel.own_kernel(KIND)).library is None:
        pytest.skip(found.name)
    return found


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "bundle_kernels", lambda bundle: NO_KERNELS)


def logits(bundle: Path) -> np.ndarray:
    return InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0).logits(IDS)


def write_product(folder: Path, inputs: int, columns: int, form: BlockFormat, bias: bool) -> Path:
    """Write a graph of one product, as export does."""
    random = np.random.default_rng(form.block)
    weight = random.standard_normal((columns, inputs)).astype(np.float32)
    added = Weight.held("b", random.standard_normal(columns).astype(np.float32)) if bias else None
    graph = GraphBuilder("product")
    plan = QuantPlan({"w": LinearPlan("blocks", form=form)})
    x = graph.input(Tensor("x", "float32", ("rows", inputs)))
    y = OnnxRuntimeDialect(graph, plan).linear(x, Weight.held("w", weight), added, "product")
    graph.output(y, Tensor("y", "float32", ("rows", columns)))
    graph.save(folder, lambda _: None)
    return folder / "product.onnx"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_session_gives_what_matmulnbits_gives(
    block: int, bits: int, bias: bool, kernel: OwnKernel, tmp_path: Path
) -> None:
    path = write_product(tmp_path, 640, 203, BlockFormat(bits, block), bias)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 3
    ours = ort.InferenceSession(kernel.give(path, options), options)
    theirs = cpu_session(path)
    for rows in (1, 2, 5, 17, 150):
        x = np.random.default_rng(rows).standard_normal((rows, 640)).astype(np.float32)
        (got,), (wanted,) = ours.run(None, {"x": x}), theirs.run(None, {"x": x})
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        assert not np.array_equal(got, wanted)  # else it was not our kernel
    assert ours.run(None, {"x": np.empty((0, 640), np.float32)})[0].shape == (0, 203)


def test_a_bundle_answers_as_on_matmulnbits(
    bundle: Path, kernel: OwnKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for inputs that round the other way, where values differ in their last bits."""
    ours = logits(bundle)
    without_kernel(monkeypatch)
    theirs = logits(bundle)
    assert not np.array_equal(ours, theirs)  # else one of them was not what it is called
    assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)


def test_many_threads_answer_alike(bundle: Path, kernel: OwnKernel) -> None:
    ids = (IDS * 40)[:200]
    models = [InternVL.load(bundle, device="cpu", threads=n, reuse_bytes=0) for n in (1, 3)]
    one, three = (model.logits(ids) for model in models)
    assert np.linalg.norm(one - three) < 0.03 * np.linalg.norm(one)


def test_the_same_file_runs_without_a_library(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(bundle)
    monkeypatch.setattr(own_kernel, "built_library", lambda: "no C++ compiler found")
    monkeypatch.setattr(blocks, "own_kernel", own_kernel.own_kernel.__wrapped__)
    found = bundle_kernel(open_bundle(bundle))
    assert str(found) == "onnxruntime's MatMulNBits and QMoE: no library (no C++ compiler found)"
    model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
    assert "own kernel" not in model.engine.backend.description
    assert np.linalg.norm(model.logits(IDS) - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("attribute", ["K", "N", "block_size"])
def test_a_node_that_its_weight_does_not_fit_is_refused(
    attribute: str, probe: Product, kernel: OwnKernel, tmp_path: Path
) -> None:
    model = onnx.load(str(probe_file(probe)))
    for node in model.graph.node:
        for one in node.attribute:
            if one.name == attribute:
                one.i = 64 if one.i == 32 else one.i // 2 if attribute == "block_size" else 224
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    opened = ort.InferenceSession(kernel.give(tmp_path / "wrong.onnx", options), options)
    with pytest.raises(Exception, match=r"of N x K|end with K"):
        opened.run(None, {"x": np.zeros((3, 256), np.float32)})


def test_zero_points_stay_with_matmulnbits(tmp_path: Path, kernel: OwnKernel) -> None:
    with few_items():
        bundle = export_bundle(
            GOLDEN / "model",
            tmp_path / "bundle",
            language="int4",
            options=QuantOptions(symmetric=False),
        )
    found = bundle_kernel(open_bundle(bundle))
    assert "zero points" in str(found)
    assert np.isfinite(logits(bundle)).all()


def test_prepared_bundles_run_on_it_too(bundle: Path, kernel: OwnKernel) -> None:
    """Only the vision graph is packed for ONNX Runtime; both are where the kernel is not."""
    wanted = logits(bundle)
    folder = prepare_bundle(bundle, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {*VISION_FILES, "prepared.json"}
    model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
    assert model.engine.backend.prepared
    assert model.engine.backend.mapped
    np.testing.assert_array_equal(model.logits(IDS), wanted)


def test_what_was_prepared_with_the_kernel_is_not_enough_without(
    bundle: Path, kernel: OwnKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_bundle(bundle, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(own_kernels, "bundle_kernel", lambda bundle: NO_KERNEL)
        with pytest.warns(PreparedWarning, match=r"a kernel that is not here.*prepare --overwrite"):
            InternVL.load(bundle, device="cpu", threads=1)
        both = prepare_bundle(bundle, overwrite=True)
        assert LANGUAGE_GRAPH in {path.name for path in both.iterdir()}
    assert find_prepared(open_bundle(bundle)) == both  # bundles that were prepared before stay so
    assert np.isfinite(logits(bundle)).all()


def test_inspect_and_doctor_say_it(
    bundle: Path, kernel: OwnKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--json", str(bundle)]) == 0
    assert json.loads(capsys.readouterr().out)["here"]["block_products"] == kernel.name
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["block_products"] == kernel.name


def test_only_what_is_copied_is_planned(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest

    def copied(given: Manifest, mapped: bool) -> int:
        graphs = frozenset({LANGUAGE_GRAPH} if mapped else ())
        return plan_memory(
            given, tokens=64, tiles=1, prepared=False, low_memory=False, mapped=graphs
        ).language_weights

    assert copied(manifest, True) == 0
    layers = replace(manifest.parts["decoder_linears"], precision={"int4 block 32": 1, "fp16": 3})
    some = replace(manifest, parts={**manifest.parts, "decoder_linears": layers})
    assert copied(some, True) == int(PACKED_GROWTH * layers.bytes * 0.75)
    assert copied(replace(manifest, parts={}), True) == copied(manifest, False) > 0


#: Anonymous bytes that opening a bundle takes, with our kernel and without.
LOADED = """
import sys
from internvl_edge.bundle.contract import Tensor
from internvl_edge.bundle.manifest import Manifest, open_bundle
from internvl_edge.runtime.backends import own_kernels, sessions
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
bundle = open_bundle(sys.argv[1], verify="size")
if sys.argv[2] == "without":
    sessions.bundle_kernels = lambda bundle: own_kernels.NO_KERNELS
own_kernels.bundle_kernels(bundle)
before = anonymous()
graphs = sessions.CpuGraphs(bundle, 1, one_at_a_time=False)
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read memory from")
def test_weights_are_mapped_and_not_copied(tmp_path: Path, kernel: OwnKernel) -> None:
    config = small_config(hidden=1024, vision_hidden=64, heads=8, kv_heads=2)
    with few_items():
        bundle = export_bundle(
            write_checkpoint(tmp_path / "checkpoint", config),
            tmp_path / "bundle",
            language="int4",
            options=QuantOptions(head_bits=4),
        )
    size = open_bundle(bundle).manifest.parts["decoder_linears"].bytes
    assert size > 4 << 20
    copied = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", LOADED, str(bundle), mode],
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            ).stdout
        )
        for mode in ("with", "without")
    }
    assert copied["without"] - copied["with"] > 0.7 * size
