"""Large files are hashed once a machine, and again when anything has written to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from internvl_edge.bundle import manifest
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.manifest import Verify, file_entry
from internvl_edge.runtime import checked_files
from internvl_edge.runtime.checked_files import CheckedFiles


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Digests of all that is read, with every file large and settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checked_files, "LEAST_BYTES", 8)
    monkeypatch.setattr(checked_files, "SETTLED_S", -1.0)
    digests, read = [], manifest.sha256_stream
    monkeypatch.setattr(
        manifest, "sha256_stream", lambda stream: digests.append(read(stream)) or digests[-1]
    )
    return digests


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "vision.data"
    path.write_bytes(bytes(range(100)))
    return path


def check(path: Path, listed: manifest.FileEntry, verify: Verify = "once") -> None:
    manifest.check_file(path, listed, verify, known=CheckedFiles())


def test_it_is_read_once(hashed: list[str], weights: Path) -> None:
    listed = file_entry(weights)
    hashed.clear()
    for _ in range(3):
        check(weights, listed)
    assert hashed == [listed.sha256]


def test_hash_reads_each_time(hashed: list[str], weights: Path) -> None:
    listed = file_entry(weights)
    check(weights, listed)
    hashed.clear()
    check(weights, listed, "hash")
    assert hashed == [listed.sha256]


def test_size_reads_nothing(hashed: list[str], weights: Path) -> None:
    listed = file_entry(weights)
    hashed.clear()
    check(weights, listed, "size")
    check(weights, listed, "size")
    assert not hashed


def test_a_change_that_hides_its_time(hashed: list[str], weights: Path) -> None:
    listed, before = file_entry(weights), weights.stat()
    check(weights, listed)
    with weights.open("r+b") as stream:
        stream.write(b"x")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="was altered"):
        check(weights, listed)


def test_what_was_refused_is_not_known(hashed: list[str], weights: Path) -> None:
    listed = manifest.FileEntry(100, "0" * 64)
    for _ in range(2):
        with pytest.raises(BundleError, match="was altered"):
            check(weights, listed)


def test_a_copy_is_another_file(hashed: list[str], weights: Path) -> None:
    listed = file_entry(weights)
    check(weights, listed)
    copy = weights.with_name("copy.data")
    copy.write_bytes(weights.read_bytes())
    hashed.clear()
    check(copy, listed)
    assert hashed == [listed.sha256]


@pytest.mark.parametrize(
    ("limit", "value"), [("SETTLED_S", 60.0), ("LEAST_BYTES", 101)], ids=["just written", "small"]
)
def test_some_are_read_each_time(
    hashed: list[str], weights: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(checked_files, limit, value)
    listed = file_entry(weights)
    hashed.clear()
    check(weights, listed)
    check(weights, listed)
    assert hashed == [listed.sha256] * 2


def test_a_damaged_note(hashed: list[str], weights: Path, tmp_path: Path) -> None:
    listed = file_entry(weights)
    check(weights, listed)
    (note,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    note.write_bytes(b"checked\nanother")
    hashed.clear()
    check(weights, listed)
    assert hashed == [listed.sha256]
