"""The demo's bundle: made once, whoever comes first, and again when what makes it changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.cli import demo
from internvl_edge.runtime import ExportError

CHECKPOINT = demo.example_room() / "checkpoint"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "internvl-edge"


def test_two_first_runs_at_once_export_once(cache: Path) -> None:
    """flock holds between threads too: each opens the file."""
    exported: list[Path] = []

    def export(checkpoint: Path, bundle: Path) -> Path:
        assert not bundle.exists()
        exported.append(bundle)
        time.sleep(0.2)
        bundle.mkdir()
        (bundle / MANIFEST).touch()
        return bundle

    found: list[Path] = []
    runs = [
        threading.Thread(target=lambda: found.append(demo._bundle(CHECKPOINT, export)))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(exported) == 1
    assert found == exported * 3


@pytest.mark.slow
def test_two_first_runs_at_once_both_answer() -> None:
    code = "import sys; from internvl_edge.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--device", "cpu", "--threads", "1"]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        output, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        assert output.count("(right)") == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_every_file_of_the_checkpoint_makes_another_bundle(tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    assert demo._bundle_key(copy) == demo._bundle_key(CHECKPOINT)
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    assert demo._bundle_key(copy) != demo._bundle_key(CHECKPOINT)


def test_another_exporter_makes_another_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = demo._bundle_key(CHECKPOINT), Path.read_bytes

    def changed(self: Path) -> bytes:
        return read(self) + (b"#" if self.match("export/graphs/vision.py") else b"")

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert demo._bundle_key(CHECKPOINT) != before


def fails(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "fcntl.flock"])
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(call, fails)
    export: Callable[[Path, Path], Path] = lambda checkpoint, bundle: bundle  # noqa: E731
    with pytest.raises(ExportError, match="Read-only file system; set XDG_CACHE_HOME"):
        demo._bundle(CHECKPOINT, export)
