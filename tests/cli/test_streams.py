"""Output anywhere: terminals of few characters, paths that are no text, readers that leave."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import CHAT, CHECKPOINT, IMAGE, command
from PIL import Image

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.cli.streams import news_at_terminal, terminal_width
from internvl_edge.runtime.inspection import render

pytestmark = pytest.mark.slow(seconds=1)

ENCODINGS = ["ascii", "latin-1", "cp437", "utf-8"]
QUESTION = "这是什么？ 模型 – “what”?"


def run(
    *words: object, encoding: str, text: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*words),
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_question_of_any_script(golden_bundle: Path, encoding: str) -> None:
    ended = run("chat", golden_bundle, IMAGE, "-p", QUESTION, *CHAT, encoding=encoding)
    assert ended.returncode == 0, ended.stderr
    ended.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_conversation_is_read_in_any_encoding(golden_bundle: Path, encoding: str) -> None:
    typed = f"{QUESTION}\n".encode()  # a terminal that calls itself something else
    ended = run("chat", golden_bundle, *CHAT, encoding=encoding, text=typed)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_loses_nothing(golden_bundle: Path, encoding: str) -> None:
    words = ("chat", golden_bundle, IMAGE, "-p", QUESTION, "--json", *CHAT)
    told, expected = (run(*words, encoding=name) for name in (encoding, "utf-8"))
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.decode(encoding))
    assert found["text"] == json.loads(expected.stdout.decode())["text"]


@pytest.mark.parametrize("name", ["模型", os.fsdecode(b"\xff\xfe")], ids=["unicode", "bytes"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_paths_of_any_name(tmp_path: Path, name: str, encoding: str) -> None:
    bundle = tmp_path / name
    ended = run("export", CHECKPOINT, "-o", bundle, encoding=encoding)
    assert ended.returncode == 0, ended.stderr
    assert (bundle / MANIFEST).exists()
    ended = run("inspect", bundle, encoding=encoding)
    assert ended.returncode == 0, ended.stderr


def test_a_page_is_chosen(golden_bundle: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (60, 60 * (1 + number)), "red") for number in range(2)]
    frames[0].save(tmp_path / "scan.tiff", save_all=True, append_images=frames[1:])
    words = ("chat", golden_bundle, tmp_path / "scan.tiff", "-p", "What?", "--json", *CHAT)
    first, second = (run(*words, *more, encoding="utf-8") for more in ((), ("--frame", "1")))
    assert b"has 2 frames, the first is taken; 'frame' chooses another, from 0" in first.stderr
    assert b"frames" not in second.stderr
    tiles = [json.loads(ended.stdout)["timings"]["tiles"] for ended in (first, second)]
    assert tiles[0] < tiles[1]


def test_a_picture_of_any_name(golden_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.png")
    shutil.copyfile(IMAGE, path)
    ended = run("chat", golden_bundle, path, "-p", "What?", *CHAT, encoding="ascii")
    assert ended.returncode == 0, ended.stderr


def test_upright(golden_bundle: Path, tmp_path: Path) -> None:
    """The tall picture is cut into other tiles than the wide one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (60, 240, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    (tmp_path / "turned.png").write_bytes(stream.getvalue())
    words = ("chat", golden_bundle, tmp_path / "turned.png", "-p", "What?", "--json", *CHAT)
    plain, upright = (
        json.loads(run(*words, *option, encoding="utf-8").stdout) for option in ([], ["--upright"])
    )
    assert plain["token_ids"] != upright["token_ids"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["-p What?", ""], ids=["asked", "conversation"])
def test_streams_that_are_closed(golden_bundle: Path, closed: str, words: str) -> None:
    line = shlex.join(command("chat", golden_bundle, *words.split(), *CHAT))
    ended = subprocess.run(
        ["sh", "-c", f"{line} {closed}"], input=b"Who?\n", capture_output=True, timeout=60
    )
    assert ended.returncode == (2 if "<" in closed and not words else 0)
    assert b"Traceback" not in ended.stderr


class Screen(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def test_values_stay_in_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = " ".join(f"word{number}" for number in range(40))
    report = {"version": "1", "features": words, "packages": {"numpy": words, "pillow": "2"}}
    assert max(map(len, render(report).splitlines())) > 80
    assert terminal_width() is None
    monkeypatch.setattr(sys, "stdout", Screen())
    lines = render(report, terminal_width()).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(render(report).split())
    assert sum(line.startswith(" " * 25 + "word") for line in lines) == len(lines) - 5


def test_what_is_done_once_is_said_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer on a machine waits for a compiler."""
    for stream, said in ((io.StringIO(), ""), (Screen(), "compiling it\n")):
        monkeypatch.setattr(sys, "stderr", stream)
        with news_at_terminal():
            logging.getLogger("internvl_edge").info("compiling %s", "it")
        logging.getLogger("internvl_edge").info("compiling %s", "more")
        assert stream.getvalue() == said
