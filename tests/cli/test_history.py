"""Typed lines are kept where users expect them, for themselves alone, and never cost an answer."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from internvl_edge.cli import history as kept
from internvl_edge.cli.editing import edit_lines
from internvl_edge.cli.history import KEPT_LINES, LONGEST_LINE, VARIABLE, History, history_path


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    usual = Path("/home/me/.local/state/internvl-edge/history")
    assert history_path({}) == history_path({"XDG_STATE_HOME": "relative"}) == usual
    assert history_path({"XDG_STATE_HOME": "/state"}) == Path("/state/internvl-edge/history")
    assert history_path({VARIABLE: "/mine", "XDG_STATE_HOME": "/state"}) == Path("/mine")
    assert history_path({VARIABLE: ""}) is None


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept.Path, "home", homeless)
    assert history_path({}) is None
    history = History(None)
    history.add("What?")
    assert history.lines() == []


def test_lines_are_kept_for_the_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "internvl-edge" / "history"
    assert History(path).lines() == []
    assert not path.parent.exists()  # nothing was typed yet
    previous = os.umask(0)
    try:
        for line in ("What is this?", "这是什么？", "/image a b.png", "\udcff"):
            History(path).add(line)
    finally:
        os.umask(previous)
    assert History(path).lines() == ["What is this?", "这是什么？", "/image a b.png", "?"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_of_others_eyes_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("older\n")
    path.chmod(0o644)
    History(path).add("newer")
    assert History(path).lines() == ["older", "newer"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "history"
    (tmp_path / "link").symlink_to(path)
    path.write_text("".join(f"{number}\n" for number in range(KEPT_LINES + 5)))
    history = History(tmp_path / "link")
    history.add("x" * (LONGEST_LINE + 1))
    lines = history.lines()
    assert (lines[0], lines[-1], len(lines)) == ("5", str(KEPT_LINES + 4), KEPT_LINES)
    assert path.read_text().count("\n") == KEPT_LINES
    assert (tmp_path / "link").is_symlink()


def test_two_conversations_at_once_lose_no_line(tmp_path: Path) -> None:
    def talk(name: str) -> None:
        history = History(tmp_path / "history")
        for number in range(50):
            history.add(f"{name} {number}")

    threads = [threading.Thread(target=talk, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = History(tmp_path / "history").lines()
    assert [line for line in lines if line[0] == "a"] == [f"a {number}" for number in range(50)]
    assert len(lines) == 100


@pytest.mark.parametrize("kind", ["folder", "pipe", "below a file", "device"])
def test_a_place_that_cannot_be_written_costs_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "history"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    else:
        path.write_text("mine")
        path = path / "history"
    for history in (History(path), History(path)):
        history.add("What?")
        assert history.lines() == []
    assert not path.is_file()


def test_lines_a_terminal_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    given: list[str] = []

    def add(line: str) -> None:
        if not line.isascii():
            raise UnicodeEncodeError("ascii", line, 0, 1, "not in it")
        given.append(line)

    monkeypatch.setattr(readline, "add_history", add)
    edit_lines(["/help"], ["one", "二", "three"])
    assert given == ["one", "three"]
