"""TensorRT's graphs on the CPU: what an ONNX Runtime that is too old for them is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GOLDEN
from dialects import RUNNABLE
from earlier import of_one_sequence
from many import ASKED, alone, same

from internvl_edge.bundle.contract import DialectName
from internvl_edge.bundle.errors import BundleError, LimitError
from internvl_edge.bundle.manifest import Bundle, open_bundle, read_manifest
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import Slice, reference
from internvl_edge.runtime.backends.reference import ReferenceBackend, ReferenceCache


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


@pytest.fixture(scope="module", params=RUNNABLE)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    return export_bundle(GOLDEN / "model", folder / "bundle", dialect=request.param)


def test_a_batch_is_answered_as_each_alone(path: Path, golden_model: InternVL) -> None:
    model = InternVL.load(path, device="cpu", threads=1, reuse_bytes=0)
    wanted = [alone(golden_model, one, max_new_tokens=12) for one in ASKED]
    same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    model.close()


@pytest.mark.parametrize("rows", [[1, 1, 1], [3, 1, 3], [1, 40, 2]])
def test_logits_beside_others_are_those_alone(path: Path, rows: list[int]) -> None:
    """Sequences of other lengths, each under a rotary base of its own and in its own capacity."""
    backend, random = ReferenceBackend(open_bundle(path), 1), np.random.default_rng(0)
    hidden = open_bundle(path).spec.language.hidden_size

    def slices() -> list[Slice]:
        made = []
        for number, (count, filled) in enumerate(zip(rows, (300, 5, 0), strict=True)):
            cache, theta = backend.new_cache(filled + 50), 1e4 * (number + 1)
            old, new = np.split(told[number], [filled])
            if filled:
                backend.forward([Slice(cache, old, theta, np.arange(0))])
                cache.state.extend(np.arange(filled), theta)
            made.append(Slice(cache, new, theta, np.arange(count)[::2]))
        return made

    lengths = [filled + count for filled, count in zip((300, 5, 0), rows, strict=True)]
    told = [random.standard_normal((length, hidden), np.float32) for length in lengths]
    got, apart = slices(), slices()
    logits = backend.forward(got)
    wanted = np.concatenate([backend.forward([one]) for one in apart])
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    for one, other in zip(got, apart, strict=True):
        assert isinstance(one.cache, ReferenceCache)
        assert isinstance(other.cache, ReferenceCache)
        for name, past in one.cache.pasts.items():
            np.testing.assert_allclose(past.numpy(), other.cache.pasts[name].numpy(), atol=1e-5)


def test_a_bundle_written_earlier_takes_one_sequence_a_pass(
    path: Path, tmp_path: Path, golden_model: InternVL
) -> None:
    older = of_one_sequence(path, tmp_path / "older")
    backend = ReferenceBackend(open_bundle(older), 1)
    with pytest.raises(LimitError, match="runs 1 sequence in a pass, got 0; run them one by one"):
        backend.forward([])
    model = InternVL.load(older, device="cpu", threads=1, reuse_bytes=0)
    assert model.engine.backend.most_slices == 1
    wanted = [alone(golden_model, one, max_new_tokens=12) for one in ASKED]
    same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    model.close()


def test_a_batch_of_none_is_refused(path: Path) -> None:
    backend = ReferenceBackend(open_bundle(path), 1)
    with pytest.raises(LimitError, match="runs 1 to 1024 sequences in a pass, got 0"):
        backend.forward([])
