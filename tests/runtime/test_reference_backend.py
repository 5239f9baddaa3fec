"""TensorRT's graphs on the CPU: what an ONNX Runtime that is too old for them is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.manifest import Bundle, read_manifest
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
