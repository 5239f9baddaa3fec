"""One process at a time works on a destination, and what killed ones left is put in order."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import small_config, write_checkpoint

from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.output import marker
from internvl_edge.export.output.marker import MARKER, claim, is_marked, scratch_folder
from internvl_edge.export.output.work import NEW, SCRATCH, work_folder
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import BusyError, ExportError, LeftoverWarning

#: Runs some code, says so, and waits to be killed.
WAITING = """
import sys, time
from pathlib import Path
target = Path(sys.argv[1])
def wait():
    print("waiting", flush=True)
    time.sleep(60)
"""
HOLD = """
from internvl_edge.export.output.work import NEW, SCRATCH, work_folder
with work_folder(target) as work:
    (work.fresh(NEW) / "vision.data").write_bytes(bytes(3000))
    (work.fresh(SCRATCH) / "unit.data").write_bytes(bytes(10))
    wait()
"""
#: An export in the place of an old bundle, killed between its two renames.
SWAP = """
from internvl_edge.export.bundle import export_bundle
def rename(self, to, rename=Path.rename):
    if self.name.startswith("new-"):
        wait()
    return rename(self, to)
Path.rename = rename
export_bundle(target.with_name("checkpoint"), target, overwrite=True)
"""
#: The same, killed when the new bundle is there and the old one is being removed.
DISCARD = """
from internvl_edge.export.bundle import export_bundle
def unlink(self, missing_ok=False, unlink=Path.unlink):
    if "old-" in str(self) and self.name == "vision.data":
        wait()
    return unlink(self, missing_ok)
Path.unlink = unlink
export_bundle(target.with_name("checkpoint"), target, overwrite=True)
"""
SCRATCHING = """
from internvl_edge.export.output.marker import scratch_folder
with scratch_folder(target) as folder:
    (folder / "unit.data").write_bytes(bytes(10))
    wait()
"""


@contextmanager
def waiting(code: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has come to the point where it waits; killed afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING + textwrap.dedent(code), str(target)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A checkpoint."""
    write_checkpoint(tmp_path / "checkpoint", small_config(layers=1, vision_layers=1))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Held.


@pytest.mark.parametrize("vision", ["fp32", "int8"])
def test_a_second_export_is_told_who_is_at_work(room: Path, vision: Any) -> None:
    with waiting(HOLD, room / "m") as process:
        before = contents(room)
        who = rf"m.work is in use by process {process.pid} on \S+, since \d{{4}}-\d\d-\S+; wait"
        with pytest.raises(BusyError, match=who):
            export_bundle(room / "checkpoint", room / "m", vision=vision)
        assert contents(room) == before
    with pytest.warns(LeftoverWarning, match="removed"):
        open_bundle(export_bundle(room / "checkpoint", room / "m", vision=vision))
    assert sorted(os.listdir(room)) == ["checkpoint", "m"]


def test_two_threads_do_not_share_a_work_folder(tmp_path: Path) -> None:
    with (
        work_folder(tmp_path / "m"),
        pytest.raises(BusyError, match=f"process {os.getpid()}"),
        work_folder(tmp_path / "m"),
    ):
        pass


def test_another_destination_is_free(room: Path) -> None:
    with work_folder(room / "m"):
        export_bundle(room / "checkpoint", room / "n")


def test_a_link_to_a_destination_is_that_destination(room: Path) -> None:
    export_bundle(room / "checkpoint", room / "m")
    (room / "link").symlink_to(room / "m")
    with work_folder(room / "m"), pytest.raises(BusyError):
        export_bundle(room / "checkpoint", room / "link", overwrite=True)


def test_a_folder_that_goes_and_comes_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marker was not there, and then a folder of that name was: nobody else's."""
    path, looked, held = tmp_path / "m.work", marker.is_marked, [marker.claim(tmp_path / "m.work")]

    def late(folder: Path) -> bool:
        if len(held) > 1:
            return looked(folder)
        held[0].remove()
        found = looked(folder)
        held.append(marker.claim(path))
        return found

    monkeypatch.setattr(marker, "is_marked", late)
    with pytest.raises(BusyError):
        marker.claim(path)
    held[1].remove()


def test_many_at_once_take_turns(tmp_path: Path) -> None:
    """Whatever the moment one ends and another begins, nobody is told that the name is taken."""
    inside, busy, failed = [0], [0], []

    def work() -> None:
        for _ in range(60):
            try:
                with work_folder(tmp_path / "m") as held:
                    inside[0] += 1
                    assert inside[0] == 1
                    held.fresh(NEW)
                    inside[0] -= 1
            except BusyError:
                busy[0] += 1
            except (ExportError, OSError, AssertionError) as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert busy[0] < 240
    assert os.listdir(tmp_path) == []


def test_a_folder_that_another_is_just_removing_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marker goes first, and it may be gone at any moment after."""
    held = marker.claim(tmp_path / "m")
    passing = tmp_path / "m-01234567"
    held.path.rename(passing)
    really, looks = marker.is_marked, iter([True, False, False])
    monkeypatch.setattr(marker, "is_marked", lambda path: next(looks, False))
    assert marker.remove_abandoned(tmp_path / "m") == []
    monkeypatch.setattr(marker, "is_marked", really)
    unlink = Path.unlink

    def gone(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        passing.rmdir()  # by somebody who found it empty

    monkeypatch.setattr(Path, "unlink", gone)
    marker._remove(passing)
    held.release()
    assert os.listdir(tmp_path) == []


def test_what_was_made_in_vain_is_held_until_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another takes it for abandoned, and finds it gone while it removes it."""
    held, lexists, busy = marker.claim(tmp_path / "m"), os.path.lexists, []
    rmtree = shutil.rmtree

    def removed(path: Path, ignore_errors: bool = False) -> None:
        with pytest.raises(BusyError):
            marker._take(path)
        busy.append(path)
        rmtree(path, ignore_errors)

    monkeypatch.setattr(os.path, "lexists", lambda path: False if not busy else lexists(path))
    monkeypatch.setattr(marker.shutil, "rmtree", removed)
    with pytest.raises(BusyError):
        marker.claim(tmp_path / "m")
    assert len(busy) == 1
    held.release()


def test_prepare_is_refused_while_another_prepares(room: Path) -> None:
    bundle = export_bundle(room / "checkpoint", room / "m")
    prepared = prepare_bundle(bundle)
    with work_folder(prepared):
        with pytest.raises(BusyError, match="is in use by process"):
            prepare_bundle(bundle, overwrite=True)
        with pytest.raises(BusyError, match="is in use by process"):
            export_bundle(room / "checkpoint", bundle, overwrite=True)
    prepare_bundle(bundle, overwrite=True)


def test_the_holder_may_be_another_container_with_the_same_process_id(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process ids decide nothing: both are process 1 there."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr("socket.gethostname", lambda: "b7dd36b0ffee")
    with (
        work_folder(room / "m"),
        pytest.raises(BusyError, match="process 1 on b7dd36b0ffee"),
    ):
        export_bundle(room / "checkpoint", room / "m")


# Left behind.


def test_what_a_killed_run_left_is_removed_and_named(tmp_path: Path) -> None:
    with waiting(HOLD, tmp_path / "m") as process:
        pass
    assert is_marked(tmp_path / "m.work")
    with pytest.warns(LeftoverWarning) as said, work_folder(tmp_path / "m"):
        pass
    texts = sorted(str(item.message) for item in said)
    left = rf" from .*m.work, left by process {process.pid} on .*, which was cut short"
    assert [text.split(" from ")[0] for text in texts] == [
        "removed an unfinished result (3.0 kB)",
        "removed scratch files (10 bytes)",
    ]
    assert all(re.search(left, text) for text in texts)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_killed_between_the_renames_the_old_bundle_comes_back(room: Path, overwrite: bool) -> None:
    old = contents(export_bundle(room / "checkpoint", room / "m", vision="fp16"))
    with waiting(SWAP, room / "m"):
        assert not (room / "m").exists()
    came_back = pytest.warns(LeftoverWarning, match="m is what it was: it was about to be replaced")
    if not overwrite:
        with came_back, pytest.raises(ExportError, match="exists"):
            export_bundle(room / "checkpoint", room / "m")
        assert contents(room / "m") == old
    else:
        with came_back:
            export_bundle(room / "checkpoint", room / "m", overwrite=True)
        assert contents(room / "m") == contents(export_bundle(room / "checkpoint", room / "n"))
    assert not list(room.glob("m.*"))


def test_killed_while_the_old_bundle_is_removed(room: Path) -> None:
    export_bundle(room / "checkpoint", room / "m", vision="fp16")
    with waiting(DISCARD, room / "m"):
        new = contents(room / "m")
    assert list((room / "m.work").glob("old-*"))
    with pytest.warns(LeftoverWarning, match="removed the rest of what .*m replaced"):
        export_bundle(room / "checkpoint", room / "m", overwrite=True)
    assert contents(room / "m") == new
    assert sorted(os.listdir(room)) == ["checkpoint", "m"]


def test_what_was_left_while_a_work_folder_was_made_or_removed(tmp_path: Path) -> None:
    """Under a passing name: empty, or marked and not held."""
    (tmp_path / "m.work-0123abcd").mkdir()
    held = claim(tmp_path / "m.work-89abcdef")
    held.release()
    (tmp_path / "m.work-89abcdef" / "new-01234567").mkdir()
    mine = tmp_path / "m.work-fedcba98"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    active = claim(tmp_path / "m.work-aaaaaaaa")
    with (
        pytest.warns(LeftoverWarning, match="removed .*m.work-"),
        work_folder(tmp_path / "m"),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["m.work-aaaaaaaa", "m.work-fedcba98"]
    active.remove()


def test_a_file_of_somebody_else_in_a_work_folder_is_kept(tmp_path: Path) -> None:
    def put() -> None:
        with work_folder(tmp_path / "m") as work:
            work.fresh(SCRATCH)
            (work.path / "notes.txt").write_text("mine")

    with pytest.warns(LeftoverWarning, match=r"kept .*m.work: this program did not write notes"):
        put()
    assert sorted(os.listdir(tmp_path / "m.work")) == [MARKER, "notes.txt"]
    with pytest.warns(LeftoverWarning, match="kept"), work_folder(tmp_path / "m"):
        pass
    assert (tmp_path / "m.work" / "notes.txt").read_text() == "mine"


def test_a_calibration_nobody_goes_on_with_is_removed(room: Path) -> None:
    def stop(total: int) -> Callable[[int], None]:
        def advance(count: int) -> None:
            raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt), pytest.warns(LeftoverWarning, match="kept the calib"):
        export_bundle(room / "checkpoint", room / "m", vision="int8", calibration_progress=stop)
    assert (room / "m.work" / "calibration").is_dir()
    with pytest.warns(LeftoverWarning, match="removed the calibration in .*: this export needs no"):
        export_bundle(room / "checkpoint", room / "m")
    assert sorted(os.listdir(room)) == ["checkpoint", "m"]


def test_scratch_of_killed_processes_is_removed(tmp_path: Path) -> None:
    with waiting(SCRATCHING, tmp_path):
        (held,) = tmp_path.iterdir()
        with scratch_folder(tmp_path) as own:
            assert sorted(tmp_path.iterdir()) == sorted([held, own])
            assert own.stat().st_mode & 0o77 == 0
        assert list(tmp_path.iterdir()) == [held]
    (tmp_path / "internvl-edge-mine").mkdir()
    (tmp_path / "internvl-edge-01234567").mkdir()
    (tmp_path / "internvl-edge-01234567" / "notes.txt").write_text("mine")
    with scratch_folder(tmp_path):
        assert not held.exists()
    assert sorted(os.listdir(tmp_path)) == ["internvl-edge-01234567", "internvl-edge-mine"]


def test_nothing_is_written_to_the_systems_folder_for_temporary_files(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units of the 26B take 2 GB, a trial within a budget 100 GB: all of it is at the output."""
    elsewhere = room / "tmp"
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    export_bundle(
        room / "checkpoint", room / "m", vision="int8", sensitivity=True, budget=100.0, kv="fp16"
    )
    assert not elsewhere.exists()


def test_a_damaged_marker_is_nobodys(tmp_path: Path) -> None:
    claim(tmp_path / "m.work").release()
    (tmp_path / "m.work" / MARKER).write_text("{}")
    with pytest.raises(ExportError, match="in the way"), work_folder(tmp_path / "m"):
        pass
    shutil.rmtree(tmp_path / "m.work")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", fail)
    with (
        pytest.raises(ExportError, match=r"cannot be locked .Operation not supported.; choose an"),
        work_folder(tmp_path / "m"),
    ):
        pass
    assert os.listdir(tmp_path) == []
