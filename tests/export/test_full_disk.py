"""Room is asked for before anything is computed, and a full disk is one typed error at any time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import small_config, write_checkpoint
from disks import Disk, NoDiskError, small_disk

from internvl_edge.bundle.disk import size_text
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export import bundle as bundle_module
from internvl_edge.export import writer
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.calibrate import Calibration
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.calibration.run import load_calibration
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.export.output.work import tree_bytes
from internvl_edge.export.prepare import prepack
from internvl_edge.export.prepare import prepare as prepare_module
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.export.room import room_for_export
from internvl_edge.export.writer import planned_layout
from internvl_edge.runtime import ExportError

pytestmark = [
    pytest.mark.slow(seconds=1),
    pytest.mark.filterwarnings("ignore::internvl_edge.runtime.LeftoverWarning"),
]
KIB = 1 << 10
RECIPE: dict[str, Any] = {
    "vision": "int8",
    "language": "int4",
    "options": QuantOptions(block=32),
    "sensitivity": False,
}
#: Runs the command line with files limited to argv[1] bytes.
LIMITED = """
import resource, sys
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.cli.main import main
calibration_run.DEFAULT_ITEMS = 2
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full disk") / "checkpoint"
    return write_checkpoint(folder, small_config(layers=1, vision_layers=1, hidden=128))


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_run, "DEFAULT_ITEMS", 2)
        return export_bundle(checkpoint, checkpoint.parent / "whole", **RECIPE)


@pytest.fixture(scope="module")
def floats(checkpoint: Path) -> Path:
    """A bundle that is packed whatever the machine."""
    return export_bundle(checkpoint, checkpoint.parent / "floats")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        with small_disk(tmp_path / "disk", 64 * KIB) as mounted:
            yield mounted
    except NoDiskError as error:
        pytest.skip(str(error))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up during the work: there was room before."""
    for module in (bundle_module, writer, prepare_module):
        monkeypatch.setattr(module, "check_space", lambda *_: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(command: Callable[..., Path], *arguments: Any, **settings: Any) -> str | None:
    """Why a command raised its typed error; None where it did not."""
    try:
        command(*arguments, **settings)
    except ExportError as error:
        return str(error)
    return None


FULL = r"no space left while writing /.*disk/\S+: No space left on device, .*(bytes|kB) free"


@pytest.mark.usefixtures("unchecked")
def test_an_export_on_a_disk_that_fills_up(disk: Disk, checkpoint: Path, whole: Path) -> None:
    """At any size too small one error; in the end, the bytes of an export that had room."""
    errors = 0
    for size in range(0, 2400 * KIB, 80 * KIB):
        disk.resize(size + 4 * KIB)
        if (reason := refused(export_bundle, checkpoint, disk.path / "m", **RECIPE)) is None:
            break
        assert re.match(FULL, reason)
        assert not (disk.path / "m").exists()
        errors += 1
    assert errors > 5
    assert contents(disk.path / "m") == contents(whole)
    assert os.listdir(disk.path) == ["m"]


@pytest.mark.usefixtures("unchecked")
def test_prepare_on_a_disk_that_fills_up(disk: Disk, floats: Path, tmp_path: Path) -> None:
    """ONNX Runtime writes there too, and has errors of its own."""
    size = tree_bytes(floats) + 64 * KIB
    disk.resize(size)
    bundle = Path(shutil.copytree(floats, disk.path / "m"))
    errors = 0
    for more in range(0, 4000 * KIB, 15 * KIB):
        disk.resize(size + more)
        if (reason := refused(prepare_bundle, bundle)) is None:
            break
        assert re.match(FULL, reason)
        assert not list((bundle / "prepared").iterdir())
        errors += 1
    assert errors > 5
    other = Path(shutil.copytree(floats, tmp_path / "other"))
    prepare_bundle(other)
    assert contents(bundle) == contents(other)


def test_the_systems_folder_for_temporary_files_is_full(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(disk.path))
    with pytest.raises(ExportError, match=FULL), scratch_folder() as folder:
        (folder / "unit.data").write_bytes(bytes(100 * KIB))
    assert os.listdir(disk.path) == []


@pytest.mark.parametrize("limit", [1, 600, 5_000, 40_000, 100_000])
@pytest.mark.parametrize("command", ["export", "prepare"])
def test_a_file_that_may_not_grow_is_one_line(
    checkpoint: Path, floats: Path, tmp_path: Path, command: str, limit: int
) -> None:
    """A quota or `ulimit`: no disk of its own is needed for these."""
    if command == "export":
        words = ["export", checkpoint, "-o", tmp_path / "m", "--vision", "int8"]
    else:
        words = ["prepare", shutil.copytree(floats, tmp_path / "m")]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    *said, line = ended.stderr.splitlines()
    assert all(text.startswith("warning: kept the calibration so far") for text in said)
    assert re.match(r"error: no space left while writing \S+: File too large, .* free", line)


# Before the calibration.


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Calibration) -> None:
        raise AssertionError("the calibration has begun")

    monkeypatch.setattr(Calibration, "run", run)


@pytest.mark.usefixtures("never_run")
def test_room_is_asked_for_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle alone would fit."""
    recipe = Recipe("int8", "int4", "fp32", RECIPE["options"])
    bundle = planned_layout(Checkpoint(checkpoint), recipe).file_bytes
    free = bundle + (16 << 20) + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    wanted = r"has 1\d\.\d MB free, this export with its calibration takes 1\.\d MB; free some"
    with pytest.raises(ExportError, match=wanted):
        export_bundle(checkpoint, tmp_path / "m", **RECIPE)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize("name", ["m" * 256, "m" * 252])
def test_a_name_that_is_too_long(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match=r"cannot write .*: File name too long"):
        export_bundle(checkpoint, tmp_path / name, **RECIPE)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("never_run")
def test_a_place_that_is_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"cannot write .*/file"):
        export_bundle(checkpoint, tmp_path / "file" / "m", **RECIPE)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.usefixtures("never_run")
def test_a_place_that_is_read_only(checkpoint: Path, disk: Disk) -> None:
    """Root may write anywhere but here."""
    disk.resize(64 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    with pytest.raises(ExportError, match=r"cannot write .*disk/m.work.*: Read-only file system"):
        export_bundle(checkpoint, disk.path / "m", **RECIPE)


@pytest.mark.usefixtures("never_run")
def test_a_target_that_is_a_mount(checkpoint: Path, whole: Path, disk: Disk) -> None:
    disk.resize(64 << 20)
    shutil.copytree(whole, disk.path, dirs_exist_ok=True)
    with pytest.raises(ExportError, match="is a mount, which cannot be replaced; give a folder in"):
        export_bundle(checkpoint, disk.path, overwrite=True, **RECIPE)


@pytest.mark.parametrize(
    "change",
    [{}, {"vision": "fp32"}, {"language": "int8"}, {"sensitivity": True}, {"budget": 1e9}],
    ids=str,
)
def test_the_room_asked_for_is_what_it_takes(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never less, but for graphs and file headers; and not several times as much."""
    settings = RECIPE | change
    most = [0]

    def look(*_: object) -> None:
        most[0] = max(most[0], tree_bytes(tmp_path))

    def counting(total: int) -> Callable[[int], None]:
        return look

    save = writer.GraphBuilder.save

    def saved(self: Any, *arguments: Any) -> Any:
        files = save(self, *arguments)
        look()
        return files

    monkeypatch.setattr(writer.GraphBuilder, "save", saved)
    export_bundle(
        checkpoint, tmp_path / "m", progress=counting, calibration_progress=counting, **settings
    )
    source, recipe = (
        Checkpoint(checkpoint),
        Recipe(settings["vision"], settings["language"], "fp32", settings["options"]),
    )
    asked = room_for_export(
        source.spec,
        recipe,
        load_calibration(source, None).samples,
        planned_layout(source, recipe).file_bytes,
        budget="budget" in settings,
    )
    assert asked / 2.5 < most[0] < asked + 200 * KIB


# Words.


def test_sizes_below_a_gigabyte_are_told_in_smaller_units() -> None:
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 12_340_000: "12.3 MB"}
    assert {size: size_text(size) for size in sizes} == sizes
    assert size_text(16_806_000_000) == "16.8 GB"


def test_onnxruntimes_own_reasons_are_told(
    floats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the disk has room, its error is something else."""

    class Fails(prepack.load_onnxruntime().InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, *arguments: Any, **settings: Any) -> None:
            raise RuntimeError("no such operator")

    bundle = shutil.copytree(floats, tmp_path / "m")
    monkeypatch.setattr("onnxruntime.InferenceSession", Fails)
    assert main(["prepare", str(bundle)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not save" in line
    assert line.endswith("packed: no such operator")
    open_bundle(bundle)
