"""A bundle that changes under a running model: what was verified is what answers, or an error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint

from internvl_edge.bundle.manifest import open_bundle, sha256_stream
from internvl_edge.bundle.verified import VerifiedFiles
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.prepare import prepack
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import BundleError, InternVL
from internvl_edge.runtime.backends import sessions
from internvl_edge.runtime.backends.prepared import prepared_folder
from internvl_edge.runtime.decoding.embedding import EmbeddingTable

PICTURES = [np.full((56, 56, 3), shade, np.uint8) for shade in (30, 90, 150, 210)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [write_checkpoint(folder / str(seed), small_config(), seed=seed) for seed in (0, 1)]


@pytest.fixture
def path(checkpoints: list[Path], tmp_path: Path) -> Path:
    return export_bundle(checkpoints[0], tmp_path / "bundle")


def load(path: Path, **options: Any) -> InternVL:
    return InternVL.load(path, device="cpu", threads=1, reuse_bytes=0, **options)


def answers(model: InternVL) -> list[list[int]]:
    return [list(model.generate("What?", [p], max_new_tokens=4).token_ids) for p in PICTURES]


def rewrite(file: Path, at: int = -1) -> None:
    """Change a byte in place; the size stays."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)
    status = file.stat()
    # A clock that ticks every few milliseconds would hide what the test does at once.
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_exported_anew_under_a_model_of_low_memory(
    checkpoints: list[Path], path: Path, verify: str
) -> None:
    """It opens its graphs again: once those are others', every answer is refused."""
    model = load(path, low_memory=True, verify=verify)
    answers(model)
    export_bundle(checkpoints[1], path, overwrite=True)
    for picture in PICTURES:
        with pytest.raises(BundleError, match="was replaced or changed after it was verified"):
            model.generate("What?", [picture], max_new_tokens=4)
    load(path).generate("What?")  # the remedy


def test_exported_anew_under_a_model_that_holds_everything(
    checkpoints: list[Path], path: Path
) -> None:
    model = load(path)
    before = answers(model)
    export_bundle(checkpoints[1], path, overwrite=True)
    assert answers(model) == before
    assert answers(load(path)) != before


def test_removed_under_a_model_that_holds_everything(path: Path) -> None:
    model = load(path)
    before = answers(model)
    shutil.rmtree(path)
    assert answers(model) == before


@pytest.mark.parametrize("name", ["vision.onnx", "language.data", "tokenizer.model"])
@pytest.mark.parametrize("change", [rewrite, Path.unlink], ids=["changed", "removed"])
def test_one_file_of_a_model_of_low_memory(
    path: Path, name: str, change: Callable[[Path], None]
) -> None:
    model = load(path, low_memory=True)
    answers(model)
    change(path / name)
    with pytest.raises(BundleError, match=f"{name} was replaced or changed"):
        answers(model)


@pytest.mark.parametrize("name", ["embedding.npy", "vision.data", "language.data"])
def test_a_mapped_file_written_to(path: Path, name: str) -> None:
    """Its new bytes would be what the next answer is computed with."""
    model = load(path)
    answers(model)
    rewrite(path / name)
    with pytest.raises(BundleError, match=f"{name} was replaced or changed"):
        answers(model)


@pytest.mark.parametrize("graph", ["vision.onnx", "language.onnx"])
@pytest.mark.parametrize("name", ["vision.data", "language.onnx", "embedding.npy"])
def test_changed_while_it_is_loaded(
    path: Path, graph: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = sessions.open_session

    def replacing(folder: Path, opening: str, *rest: Any, **options: Any) -> Any:
        session = opened(folder, opening, *rest, **options)
        if opening == graph:
            shutil.copyfile(path / name, path / "copy")
            (path / "copy").replace(path / name)
        return session

    monkeypatch.setattr(sessions, "open_session", replacing)
    with pytest.raises(BundleError, match=f"{name} was replaced or changed"):
        load(path)


def test_tokenizer_changed_while_it_is_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = EmbeddingTable.load

    def late(bundle: Any) -> EmbeddingTable:
        table = loaded(bundle)
        rewrite(path / "tokenizer.model")
        return table

    monkeypatch.setattr(EmbeddingTable, "load", late)
    with pytest.raises(BundleError, match=r"tokenizer.model was replaced or changed"):
        load(path)


def test_prepared_weights_written_anew(path: Path) -> None:
    prepare_bundle(path)
    model = load(path, low_memory=True)
    answers(model)
    prepare_bundle(path, overwrite=True)
    with pytest.raises(BundleError, match="was replaced or changed"):
        answers(model)


def test_prepared_weights_written_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are mapped; a model that holds both graphs looks at them before each pass."""
    monkeypatch.setattr(prepack, "LEAST_BYTES", 1 << 12)
    prepare_bundle(path)
    model = load(path)
    answers(model)
    rewrite(prepared_folder(open_bundle(path)) / "language.data")
    with pytest.raises(BundleError, match=r"language.data was replaced or changed"):
        answers(model)


def test_a_file_written_to_while_it_is_verified(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(stream: BinaryIO) -> str:
        digest = sha256_stream(stream)
        rewrite(Path(os.readlink(f"/proc/self/fd/{stream.fileno()}")))
        return digest

    monkeypatch.setattr("internvl_edge.bundle.manifest.sha256_stream", late)
    with pytest.raises(BundleError, match="was written to while it was read"):
        open_bundle(path)


def test_held_files_are_closed(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = VerifiedFiles(path).hold(["vision.data", "language.data"])
    assert len(os.listdir("/proc/self/fd")) == before + 2
    held.check()
    del held
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_missing_cannot_be_held(path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*none"):
        VerifiedFiles(path).hold(["vision.data", "none"])
