"""Int8 keys and values are tried: what ONNX Runtime declares is not always what it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import GOLDEN
from onnx import numpy_helper
from packaging.version import Version

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.graphs.dialects.probes import cache_probe
from internvl_edge.runtime import DeviceError, InternVL
from internvl_edge.runtime.backends import int8_cache, trials
from internvl_edge.runtime.backends.int8_cache import takes_int8_cache

PROBE = Path(int8_cache.__file__).with_name("probes") / "cache.onnx"

needs_int8 = pytest.mark.skipif(
    not takes_int8_cache(), reason="this ONNX Runtime has no int8 cache to export"
)


def test_the_probe_is_what_export_writes() -> None:
    assert onnx.load(PROBE) == cache_probe()


def test_onnxruntime_takes_it_from_1_27_on() -> None:
    assert takes_int8_cache() == (Version(ort.__version__) >= Version("1.27"))


@pytest.mark.parametrize("fault", ["not there", "does not load", "does not run", "wrong"])
def test_each_fault_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    model = onnx.load(PROBE)
    (attention,) = (n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    if fault == "does not load":
        attention.input.append("no such value")
    elif fault == "does not run":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3  # it is given two rows
    elif fault == "wrong":
        (scales,) = (t for t in model.graph.initializer if t.name == "cache.0.value.scales")
        scales.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scales), scales.name))
    path = tmp_path / "cache.onnx"
    if fault != "not there":
        onnx.save(model, path)
    monkeypatch.setattr(int8_cache, "PROBE", path)
    assert not takes_int8_cache.__wrapped__()


@needs_int8
def test_it_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "user_cache", lambda: tmp_path)
    assert takes_int8_cache.__wrapped__()
    monkeypatch.setattr(int8_cache, "_comes_back", lambda: False)
    assert takes_int8_cache.__wrapped__()


@needs_int8
def test_a_bundle_it_cannot_run_is_refused_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantOptions(naive=True)
    bundle = export_bundle(GOLDEN / "model", tmp_path / "bundle", kv="int8", options=options)
    assert len(InternVL.load(bundle, device="cpu", threads=1).logits(np.array([1, 5]))) == 2
    monkeypatch.setattr(int8_cache, "takes_int8_cache", lambda: False)
    with pytest.raises(DeviceError, match=r"install onnxruntime 1\.27"):
        InternVL.load(bundle, device="cpu")
