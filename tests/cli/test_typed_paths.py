"""Paths as typed: none that is empty, and `~` is the user's home where no shell has read it."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import pytest
from command_line import CHECKPOINT, error_line
from test_commands import commands, found

from internvl_edge.cli.main import main

#: What stands for a path in the usage.
PATHS = {"BUNDLE", "FLOAT_BUNDLE", "CHECKPOINT", "CHECKPOINT|BUNDLE", "DIR", "FILE", "FILE.jsonl"}


def parser_of(path: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    if (module := found(path).module) is not None:
        importlib.import_module(f"internvl_edge.{module}").add_arguments(parser)
    return parser


@pytest.mark.parametrize("path", [*commands()], ids=" ".join)
def test_every_path_is_taken_as_one(path: tuple[str, ...]) -> None:
    parser = parser_of(path)
    listed = parser.get_default("trailing")  # words behind options too, which have no type
    others = [one for one in parser._actions if one.metavar in PATHS and one.type is not Path]
    assert [one.dest for one in others if one.dest != listed] == []


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["export", "", "-o", "x"], "CHECKPOINT"),
        (["export", CHECKPOINT, "-o", ""], "-o/--output"),
        (["inspect", ""], "CHECKPOINT|BUNDLE"),
        (["prepare", ""], "BUNDLE"),
        (["chat", "", "-p", "Hi"], "BUNDLE"),
    ],
    ids=str,
)
def test_an_empty_path_is_not_this_folder(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as that of a variable which is not set."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 2
    assert f"argument {name}: it is empty, it must be a path" in capsys.readouterr().err


def test_home_where_no_shell_has_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called `~` is one that people remove as they should not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    assert f"{tmp_path}/there exists" in error_line(
        capsys, "export", CHECKPOINT, "--output=~/there"
    )
    assert f"{tmp_path}/none" in error_line(capsys, "chat", "~/none", "-p", "Hi")
    assert os.listdir(here) == []
