"""Files: regular ones only, without waiting, and never more than the limit."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from internvl_edge.bundle.files import FileIdentity, check_regular, open_regular, read_bytes


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_pipe_is_refused_at_once(pipe: Path) -> None:
    with pytest.raises(OSError, match="it is a named pipe, not a regular file"):
        open_regular(pipe)


def test_link_to_a_pipe(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pipe)
    with pytest.raises(OSError, match="named pipe"):
        read_bytes(tmp_path / "link", 10)


def test_pipe_that_takes_the_file_s_place(
    pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and opening."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("internvl_edge.bundle.files.check_regular", lambda path: None)
    with pytest.raises(OSError, match="named pipe"):
        open_regular(pipe)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_device(path: str) -> None:
    with pytest.raises(OSError, match="it is a device, not a regular file"):
        read_bytes(path, 10)


def test_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        with pytest.raises(OSError, match="it is a socket"):
            read_bytes("socket", 10)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path, 10)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000], ids=["NUL", "surrogate", "long"])
def test_no_path(path: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011  whichever the system says
        check_regular(path)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match=os.strerror(40)):
        read_bytes(tmp_path / "a", 10)


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_within_the_limit(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert read_bytes(tmp_path / "file", 10) == b"x" * size


def test_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="it has 11 bytes, at most 10 are read"):
        read_bytes(tmp_path / "file", 10)


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    path.write_bytes(b"x")
    assert read_bytes(path, 10) == b"x"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_file_that_does_not_tell_its_size() -> None:
    assert read_bytes("/proc/self/stat", 1 << 20).startswith(str(os.getpid()).encode())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_file_that_tells_less_than_it_has() -> None:
    with pytest.raises(OSError, match="it has more than"):
        read_bytes("/proc/self/stat", 5)


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a")
    os.utime(path, ns=(1, 1))
    first = FileIdentity.at(path)
    assert first == FileIdentity.at(path)
    path.write_bytes(b"b")  # of the same size, at another time
    assert FileIdentity.at(path) != first
    os.utime(path, ns=(1, 1))
    assert FileIdentity.at(path) == first
    (tmp_path / "other").write_bytes(b"a")
    os.utime(tmp_path / "other", ns=(1, 1))
    (tmp_path / "other").replace(path)
    assert FileIdentity.at(path) != first
    path.unlink()
    assert FileIdentity.at(path) is None
