"""Nothing is removed that this program did not write, whatever it is called and wherever it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from PIL import Image

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import ExportError, InternVLEdgeWarning
from internvl_edge.runtime.backends.prepared import find_prepared

pytestmark = pytest.mark.filterwarnings("error::internvl_edge.runtime.InternVLEdgeWarning")


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A checkpoint."""
    write_checkpoint(tmp_path / "checkpoint", small_config(layers=1, vision_layers=1))
    return tmp_path


@pytest.fixture
def bundle(room: Path) -> Path:
    return export_bundle(room / "checkpoint", room / "bundle")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, links followed, by path."""
    return {
        str(Path(base, name).relative_to(folder)): Path(base, name).read_bytes()
        for base, _, names in os.walk(folder)
        for name in names
    }


def save_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(2):
        Image.fromarray(np.full((56, 56, 3), 99 * number, np.uint8)).save(folder / f"{number}.png")
    return folder


# Names that a work folder might have.


@pytest.mark.parametrize("name", ["m.calibration", "m.partial", "m.old", "m-work"])
def test_calibration_data_of_any_name_is_kept(room: Path, name: str) -> None:
    pictures = save_pictures(room / name)
    before = contents(pictures)
    words = ["export", str(room / "checkpoint"), "-o", str(room / "m"), "--vision", "int8"]
    assert main([*words, "--calibration", str(pictures)]) == 0
    assert contents(pictures) == before
    assert sorted(os.listdir(room)) == sorted(["checkpoint", "m", name])


@pytest.mark.parametrize("vision", ["fp32", "int8"])
def test_a_folder_of_the_work_folders_name_is_kept(room: Path, vision: Any) -> None:
    pictures = save_pictures(room / "m.work")
    before = contents(room)
    with pytest.raises(ExportError, match=r"m.work is in the way: it was not made by this progr"):
        export_bundle(room / "checkpoint", room / "m", vision=vision, calibration=pictures)
    assert contents(room) == before


def test_an_empty_folder_or_a_link_of_that_name_is_kept(room: Path) -> None:
    (room / "m.work").mkdir()
    with pytest.raises(ExportError, match="in the way"):
        export_bundle(room / "checkpoint", room / "m")
    (room / "m.work").rmdir()
    (room / "m.work").symlink_to(room / "checkpoint")
    with pytest.raises(ExportError, match="in the way"):
        export_bundle(room / "checkpoint", room / "m")
    assert (room / "m.work").is_symlink()


# The source.


def beside(room: Path, target: Path) -> Path:
    return target


def linked(room: Path, target: Path) -> Path:
    (room / "link").symlink_to(target)
    return room / "link"


def mounted(room: Path, target: Path) -> Path:
    (room / "mount").mkdir()
    done = subprocess.run(["mount", "--bind", target, room / "mount"], capture_output=True)
    if done.returncode:
        pytest.skip(f"no bind mounts here: {done.stderr.decode()}")
    return room / "mount"


Alias = Callable[[Path, Path], Path]


@pytest.mark.parametrize("alias", [beside, linked, mounted])
@pytest.mark.parametrize("inside", [".", "hub"])
def test_a_source_in_the_target_is_refused(
    room: Path, bundle: Path, alias: Alias, inside: str
) -> None:
    """A checkpoint that also holds a bundle, or lies in a folder that does."""
    source = bundle / inside
    shutil.copytree(room / "checkpoint", source, dirs_exist_ok=True)
    before = contents(bundle)
    target = alias(room, bundle)
    try:
        with pytest.raises(ExportError, match=r"is, or holds, the checkpoint .*; choose another"):
            export_bundle(source, target, overwrite=True)
        with pytest.raises(ExportError, match=r"is, or holds, the checkpoint .*; choose another"):
            export_bundle(target / inside, bundle, overwrite=True)
        assert contents(bundle) == before
    finally:
        if alias is mounted:
            subprocess.run(["umount", target], check=True)


def test_a_target_in_the_source_is_refused(room: Path) -> None:
    with pytest.raises(ExportError, match="lies in the checkpoint"):
        export_bundle(room / "checkpoint", room / "checkpoint" / "bundle")
    assert not (room / "checkpoint" / "bundle").exists()


def test_calibration_data_in_the_target_is_refused(room: Path, bundle: Path) -> None:
    pictures = save_pictures(bundle / "pictures")
    before = contents(bundle)
    with pytest.raises(ExportError, match=r"is, or holds, the calibration data"):
        export_bundle(
            room / "checkpoint", bundle, vision="int8", calibration=pictures, overwrite=True
        )
    assert contents(bundle) == before


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_source_that_shares_files_with_the_target_is_refused(
    room: Path, bundle: Path, link: Callable[[Path, Path], None]
) -> None:
    shared = room / "checkpoint" / "tokenizer.model"
    shared.unlink()
    link(bundle / "tokenizer.model", shared)
    before = contents(room)
    with pytest.raises(ExportError, match=r"tokenizer.model is the same file as .*tokenizer.model"):
        export_bundle(room / "checkpoint", bundle, overwrite=True)
    assert contents(room) == before


# Files of somebody else in a target.


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "prepared/notes.txt", "engines/sm87/vision.plan", "empty", ".git/HEAD", "x.onnx"],
)
def test_files_of_somebody_else_are_named_and_kept(room: Path, bundle: Path, name: str) -> None:
    path = bundle / name
    if name == "empty":
        path.mkdir()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = contents(bundle)
    shown = name.split("/")[0] if name.startswith(".git") else name.rpartition("/vision")[0] or name
    with pytest.raises(ExportError, match=rf"did not write {shown}, which would be lost; move"):
        export_bundle(room / "checkpoint", bundle, overwrite=True)
    assert contents(bundle) == before


def test_a_file_that_comes_during_the_export_is_kept(room: Path, bundle: Path) -> None:
    def put(total: int) -> Callable[[int], None]:
        (bundle / "notes.txt").write_text("mine")
        return lambda _: None

    before = contents(bundle)
    with pytest.raises(ExportError, match=r"did not write notes.txt"):
        export_bundle(room / "checkpoint", bundle, overwrite=True, progress=put)
    assert contents(bundle) == before | {"notes.txt": b"mine"}


def test_a_file_that_comes_with_the_rename_is_kept(
    room: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == bundle:
            (bundle / "notes.txt").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.warns(InternVLEdgeWarning, match=r"kept .*kept-.*: .* did not write notes.txt"):
        export_bundle(room / "checkpoint", bundle, overwrite=True)
    open_bundle(bundle)
    (kept,) = room.glob("bundle.kept-*")
    assert contents(kept) == {"notes.txt": b"mine"}


def test_what_this_program_wrote_is_replaced(room: Path) -> None:
    """Prepared weights of an earlier bundle included."""
    target = export_bundle(room / "checkpoint", room / "int8", vision="int8")
    prepare_bundle(target)
    export_bundle(room / "checkpoint", target, overwrite=True)
    assert contents(target) == contents(export_bundle(room / "checkpoint", room / "fresh"))


@pytest.mark.parametrize("content", ['{"name": "web"}', '{"files": {"index.js": 1}}', "[]", "7"])
def test_another_programs_bundle_json_is_no_bundle(room: Path, content: str) -> None:
    target = room / "web"
    target.mkdir()
    (target / MANIFEST).write_text(content)
    (target / "index.js").write_text("mine")
    with pytest.raises(ExportError, match="is not a bundle"):
        export_bundle(room / "checkpoint", target, overwrite=True)
    assert (target / "index.js").read_text() == "mine"


@pytest.mark.parametrize("damage", ["", "{", '{"format": "internvl-edge bundle"}'])
def test_a_damaged_bundle_can_be_replaced(room: Path, bundle: Path, damage: str) -> None:
    (bundle / MANIFEST).write_text(damage)
    export_bundle(room / "checkpoint", bundle, overwrite=True)
    open_bundle(bundle)


@pytest.mark.parametrize("name", ["../checkpoint/model.safetensors", "..", ".", "", "/etc/passwd"])
def test_a_manifest_that_lists_files_elsewhere(room: Path, bundle: Path, name: str) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"][name] = {"bytes": 1, "sha256": ""}
    (bundle / MANIFEST).write_text(json.dumps(data))
    before = contents(room / "checkpoint")
    export_bundle(room / "checkpoint", bundle, overwrite=True)
    assert contents(room / "checkpoint") == before


# Prepared weights.


@pytest.fixture
def prepared(room: Path) -> Path:
    """The folder of prepared weights in a bundle."""
    return prepare_bundle(export_bundle(room / "checkpoint", room / "float"))


def test_prepare_keeps_what_it_did_not_write(prepared: Path) -> None:
    (prepared / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"did not write notes.txt"):
        prepare_bundle(prepared.parents[1], overwrite=True)
    assert (prepared / "notes.txt").read_text() == "mine"
    (prepared / "notes.txt").unlink()
    prepare_bundle(prepared.parents[1], overwrite=True)


def test_prepare_replaces_no_folder_of_somebody_else(prepared: Path) -> None:
    shutil.rmtree(prepared)
    prepared.mkdir()
    (prepared / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="will not be replaced"):
        prepare_bundle(prepared.parents[1], overwrite=True)
    assert (prepared / "notes.txt").read_text() == "mine"


def test_superseded_weights_go_and_other_files_stay(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prepared / "notes.txt").write_text("mine")
    monkeypatch.setattr("onnxruntime.__version__", "1.31.99")
    with pytest.warns(InternVLEdgeWarning, match=r"kept .*: this program did not write notes.txt"):
        newer = prepare_bundle(prepared.parents[1])
    assert find_prepared(open_bundle(prepared.parents[1])) == newer
    assert contents(prepared) == {"notes.txt": b"mine"}
