"""Commands cut short: Ctrl-C, SIGTERM, readers that go away, outputs that cannot be written."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import CHAT, CHECKPOINT, IMAGE, SLOW, command, put_kernels


def _slow_commands(golden: Path, room: Path) -> dict[str, tuple[Sequence[object], str]]:
    """Each command, and a hook that makes it stop in the middle of its work."""
    weights = SLOW.format(
        module="internvl_edge.export.checkpoint.weights", owner="Weight", function="cast_blocks"
    )
    shapes = SLOW.format(
        module="internvl_edge.export.checkpoint.checkpoint",
        owner="Checkpoint",
        function="_read_shapes",
    )
    decode = SLOW.format(
        module="internvl_edge.runtime.decoding.passes", owner="Engine", function="following"
    )
    prefill = SLOW.format(
        module="internvl_edge.runtime.decoding.passes", owner="Engine", function="begin"
    )
    tile = SLOW.format(module="internvl_edge.runtime.model", owner="InternVL", function="tile")
    demo = f"""
import importlib.util, types
def find(name, package=None, find_spec=importlib.util.find_spec):
    if name != "internvl_edge.examples.tiny_ocr":
        return find_spec(name, package)
    return types.SimpleNamespace(submodule_search_locations=[{str(room)!r}])
importlib.util.find_spec = find
"""
    chat = ["chat", golden, "-p", "Please describe the image.", *CHAT]
    return {
        "export": (["export", CHECKPOINT, "-o", room / "bundle"], weights),
        "inspect": (["inspect", CHECKPOINT], shapes),
        "chat, prefill": (chat, prefill),
        "chat, decode": (chat, decode),
        "chat --json": ([*chat, "--json"], decode),
        "demo, export": (["demo"], demo + weights),
        "demo, image": (["demo", *CHAT[:4]], demo + tile),
    }


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", _slow_commands(Path(), Path()))
def test_interrupted(
    golden_bundle: Path, tmp_path: Path, name: str, sent: signal.Signals, status: int
) -> None:
    room, cache = tmp_path / "room", tmp_path / "cache"
    shutil.copytree(CHECKPOINT, room / "checkpoint")
    script = {"image": IMAGE, "turns": [{"question": "What is it?", "answer": "A sign."}]}
    (room / "receipt.json").write_text(json.dumps(script))
    put_kernels(cache)
    arguments, hook = _slow_commands(golden_bundle, room)[name]
    process = subprocess.Popen(
        command(*arguments, hook=hook),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )
    assert process.stdout is not None
    if not any(line.endswith("working\n") for line in process.stdout):
        pytest.fail(f"the command ended by itself: {process.communicate()}")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert errors.strip() == ("interrupted" if sent == signal.SIGINT else "")
    assert sorted(os.listdir(room)) == ["checkpoint", "receipt.json"]
    left = [path for path in cache.rglob("*") if "partial" in path.name]
    assert left == []


def test_interrupt_of_an_answer_keeps_the_conversation(golden_bundle: Path) -> None:
    """At a terminal: the first Ctrl-C ends the answer, Ctrl-D the conversation."""
    hook = """
from internvl_edge.runtime.decoding.passes import Engine
def slowly(*arguments, decode=Engine.decode):
    time.sleep(0.05)
    return decode(*arguments)
Engine.decode = slowly
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("chat", golden_bundle, *CHAT[:4], hook=hook),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    os.close(theirs)
    assert process.stdout is not None
    assert "Ctrl-C" in process.stdout.readline()
    os.write(ours, b"Please describe the image.\n")
    assert process.stdout.read(3).startswith("> ")  # the prompt, then the answer's first letter
    process.send_signal(signal.SIGINT)
    os.write(ours, b"\x04")
    _, errors = process.communicate(timeout=30)
    os.close(ours)
    assert process.returncode == 0
    assert errors.startswith("[cancelled]")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "BUNDLE"], ["inspect", "BUNDLE", "--json"], ["chat", "BUNDLE", "-p", "Hi", *CHAT]],
    ids=["inspect", "inspect --json", "chat"],
)
def test_broken_pipe(golden_bundle: Path, arguments: list[str]) -> None:
    """The reader of the output, such as `head`, is gone before anything is written."""
    arguments = [str(golden_bundle) if item == "BUNDLE" else item for item in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            command(*arguments),
            stdout=writing,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_head(golden_bundle: Path) -> None:
    line = f"{shlex.join(command('inspect', golden_bundle))} | head -1"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["inspect", "chat"])
def test_output_that_cannot_be_written(golden_bundle: Path, name: str) -> None:
    more = [] if name == "inspect" else ["-p", "Hi", *CHAT]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            command(name, golden_bundle, *more),
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert "No space left" in line
