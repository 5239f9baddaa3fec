"""TensorRT's graphs on the CPU: what an ONNX Runtime that is too old for them is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import GOLDEN

from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.errors import BundleError, LimitError
from internvl_edge.bundle.manifest import Bundle, open_bundle, read_manifest
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime.backends import reference
from internvl_edge.runtime.backends.reference import ReferenceBackend


@pytest.mark.parametrize(("dialect", "named"), [("tensorrt", True), ("tensorrt-portable", False)])
def test_graphs_beyond_the_installed_onnxruntime_name_the_one_they_need(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, dialect: DialectName, named: bool
) -> None:
    """The portable ones have old operators only: another version would not help."""

    def refuse(*_: object) -> None:
        raise BundleError("language.onnx does not load: no kernel for TensorScatter(24)")

    monkeypatch.setattr(reference, "open_graphs", refuse)
    manifest = replace(read_manifest(golden_bundle), dialect=dialect)
    with pytest.raises(BundleError, match="does not load") as refused:
        ReferenceBackend(Bundle(golden_bundle, manifest), 1)
    assert ("onnxruntime 1.25 or later" in str(refused.value)) == named


def test_a_batch_is_one_sequence(tmp_path: Path) -> None:
    path = export_bundle(GOLDEN / "model", tmp_path / "bundle", dialect="tensorrt-portable")
    backend = ReferenceBackend(open_bundle(path), 1)
    with pytest.raises(LimitError, match="runs 1 sequence in a pass, got 0; run them one by one"):
        backend.forward([])
