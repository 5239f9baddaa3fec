"""Exports that fail half-way leave nothing behind, and an old bundle as it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from numpy.lib import format as npy_format
from safetensors.numpy import load_file, save_file

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.progress import progress_bar
from internvl_edge.runtime import BundleError, CheckpointError, ExportError

#: Runs `internvl-edge export` with files limited to argv[3] bytes.
LIMITED = """
import resource, sys
from internvl_edge.cli.main import main
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(["export", sys.argv[1], "-o", sys.argv[2], *sys.argv[4:]]))
"""

#: Runs `internvl-edge export` and stops for a minute after the first block of the weights.
SLOW = """
import signal, sys, time
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.cli.main import main

def slowly(self, cast_blocks=Weight.cast_blocks):
    for block in cast_blocks(self):
        yield block
        print("writing", flush=True)
        time.sleep(60)

Weight.cast_blocks = slowly
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell job ignores it
sys.exit(main(["export", sys.argv[1], "-o", sys.argv[2], *sys.argv[3:]]))
"""

Sabotage = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config())


@pytest.fixture
def old(tmp_path: Path, checkpoint: Path) -> Path:
    """A bundle of an earlier checkpoint."""
    other = write_checkpoint(tmp_path / "other", small_config(), seed=1)
    bundle = export_bundle(other, tmp_path / "bundle")
    shutil.rmtree(other)
    return bundle


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script and wait until it says that it is writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n", process.communicate()
    return process


def spoil_weights(checkpoint: Path, name: str = "language_model.output.weight") -> None:
    """Put a NaN where the export finds it last."""
    state = load_file(checkpoint / "model.safetensors")
    state[name].reshape(-1)[-1] = np.nan
    save_file(state, checkpoint / "model.safetensors")


# No space.


def disk_of(free: int) -> Callable[[object], SimpleNamespace]:
    return lambda path: SimpleNamespace(total=1 << 40, used=0, free=free)


def test_no_space_is_seen_before_writing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk_of(10 << 20))
    with pytest.raises(ExportError, match=r"10\.5 MB free, the bundle takes \d+\.\d kB; free"):
        export_bundle(checkpoint, checkpoint.parent / "bundle")
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


def test_no_space_creates_no_parent(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk_of(0))
    with pytest.raises(ExportError, match="0 bytes free"):
        export_bundle(checkpoint, checkpoint.parent / "new" / "deep" / "bundle")
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


@pytest.mark.parametrize("limit", [1, 10_000, 150_000])
def test_write_that_fails_half_way(checkpoint: Path, limit: int) -> None:
    ended = run(LIMITED, checkpoint, checkpoint.parent / "bundle", limit)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: no space left while writing")
    assert line.endswith("nothing was kept")
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


def test_write_within_the_limit(checkpoint: Path) -> None:
    """The runs above fail for the limit."""
    ended = run(LIMITED, checkpoint, checkpoint.parent / "bundle", 10_000_000)
    assert (ended.returncode, ended.stderr) == (0, "")
    open_bundle(checkpoint.parent / "bundle")


def _fail(code: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def _graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx.save", _fail(errno.ENOSPC))


def _embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy_format, "write_array_header_1_0", _fail(errno.ENOSPC))


def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copyfile", _fail(errno.EDQUOT))


def _manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", _fail(errno.ENOSPC))


def _rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new bundle cannot be put into place; anything else can be renamed."""
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith("new-"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("sabotage", [_graph, _embedding, _tokenizer, _manifest, _rename])
def test_failure_at_any_stage_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(ExportError):
        export_bundle(checkpoint, checkpoint.parent / "bundle")
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


# The place of the output.


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "empty directory", "directory"])
def test_output_that_is_no_bundle_is_kept(checkpoint: Path, kind: str, overwrite: bool) -> None:
    target = checkpoint.parent / "bundle"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "directory":
        (target / "thesis.tex").write_text("mine")
    before = contents(checkpoint.parent)
    with pytest.raises(ExportError, match="is not a bundle" if overwrite else "overwrite=True"):
        export_bundle(checkpoint, target, overwrite=overwrite)
    assert contents(checkpoint.parent) == before


def test_existing_bundle_is_kept(checkpoint: Path, old: Path) -> None:
    before = contents(old)
    with pytest.raises(ExportError, match="exists; choose another output or pass overwrite=True"):
        export_bundle(checkpoint, old)
    assert contents(old) == before


def test_overwrite_replaces_the_bundle(checkpoint: Path, old: Path) -> None:
    export_bundle(checkpoint, old, overwrite=True)
    fresh = export_bundle(checkpoint, checkpoint.parent / "fresh")
    assert contents(old) == contents(fresh)
    assert sorted(os.listdir(checkpoint.parent)) == ["bundle", "checkpoint", "fresh"]


@pytest.mark.parametrize("output", [".", "../bundle", "../bundle/"])
def test_overwrite_by_a_relative_path(
    checkpoint: Path, old: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    before = contents(old)
    monkeypatch.chdir(old)
    export_bundle(checkpoint, output, overwrite=True)
    assert contents(old) != before
    assert sorted(os.listdir(checkpoint.parent)) == ["bundle", "checkpoint"]


def test_overwrite_through_a_link(checkpoint: Path, old: Path) -> None:
    before = contents(old)
    link = checkpoint.parent / "current"
    link.symlink_to(old)
    export_bundle(checkpoint, link, overwrite=True)
    assert link.is_symlink()
    assert contents(old) != before
    open_bundle(link)


@pytest.mark.parametrize("sabotage", [_graph, _embedding, _tokenizer, _manifest, _rename])
def test_failed_overwrite_keeps_the_old_bundle(
    checkpoint: Path, old: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage
) -> None:
    before = contents(old)
    sabotage(monkeypatch)
    with pytest.raises(ExportError):
        export_bundle(checkpoint, old, overwrite=True)
    assert contents(old) == before
    assert sorted(os.listdir(checkpoint.parent)) == ["bundle", "checkpoint"]


def test_overwrite_by_bad_weights_keeps_the_old_bundle(checkpoint: Path, old: Path) -> None:
    before = contents(old)
    spoil_weights(checkpoint)
    with pytest.raises(CheckpointError):
        export_bundle(checkpoint, old, overwrite=True)
    assert contents(old) == before
    assert sorted(os.listdir(checkpoint.parent)) == ["bundle", "checkpoint"]


def test_overwrite_without_space_keeps_the_old_bundle(checkpoint: Path, old: Path) -> None:
    before = contents(old)
    assert run(LIMITED, checkpoint, old, 150_000, "--overwrite").returncode == 2
    assert contents(old) == before
    assert sorted(os.listdir(checkpoint.parent)) == ["bundle", "checkpoint"]


def test_place_that_cannot_be_written(checkpoint: Path) -> None:
    (checkpoint.parent / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        export_bundle(checkpoint, checkpoint.parent / "file" / "bundle")


# Interrupted.


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_export_leaves_nothing(
    checkpoint: Path, sent: signal.Signals, status: int
) -> None:
    process = start(SLOW, checkpoint, checkpoint.parent / "bundle")
    assert len(os.listdir(checkpoint.parent)) == 2
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_overwrite_keeps_the_old_bundle(
    checkpoint: Path, old: Path, sent: signal.Signals
) -> None:
    before = contents(old)
    process = start(SLOW, checkpoint, old, "--overwrite")
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert contents(old) == before


def test_killed_export_leaves_nothing_that_loads(checkpoint: Path) -> None:
    target = checkpoint.parent / "bundle"
    process = start(SLOW, checkpoint, target)
    process.kill()
    process.communicate(timeout=30)
    assert not target.exists()
    (partial,) = (path for path in checkpoint.parent.iterdir() if path != checkpoint)
    assert not (partial / MANIFEST).exists()
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(partial)
    open_bundle(export_bundle(checkpoint, target))


def test_interrupt_between_the_renames_keeps_the_old_bundle(
    checkpoint: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self == old:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, old, overwrite=True)
    assert contents(old) == before
    assert sorted(os.listdir(checkpoint.parent)) == ["bundle", "checkpoint"]


# The progress bar.


class _Terminal(list[str]):
    """A stream that claims to be a terminal."""

    def write(self, text: str) -> int:
        self.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_bar_of_a_failed_export_ends_its_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the error stands on a line of its own."""
    spoil_weights(checkpoint)
    terminal: Any = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(CheckpointError), progress_bar("export") as progress:
        export_bundle(checkpoint, checkpoint.parent / "bundle", progress=progress)
    shown = "".join(terminal)
    assert "export" in shown
    assert shown.endswith("\n")


def test_no_bar_without_a_terminal(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("export") as progress:
        export_bundle(checkpoint, checkpoint.parent / "bundle", progress=progress)
    assert capsys.readouterr() == ("", "")
