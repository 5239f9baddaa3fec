"""Running the command line from tests: in this process, or in one with a hook before it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import GOLDEN

from internvl_edge.cli.main import main
from internvl_edge.kernels import build, ops

CHECKPOINT = GOLDEN / "model"
IMAGE = str(GOLDEN / "images" / "img0.png")
CHAT = ("--device", "cpu", "--threads", "1", "--max-new-tokens", "8")

#: The command line, with a hook before it. Shells start background jobs deaf to Ctrl-C.
RUN = """
import signal, sys, time
from internvl_edge.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
{hook}
sys.exit(main(sys.argv[1:]))
"""

#: Makes a function say so and take a minute when it is called.
SLOW = """
from {module} import {owner}
def slowly(*arguments, **settings):
    print("working", flush=True)
    time.sleep(60)
{owner}.{function} = slowly
"""

#: Makes packages look as if they were not installed.
BLOCK = "sys.modules.update(dict.fromkeys({names}))"


def command(*arguments: object, hook: str = "") -> list[str]:
    return [sys.executable, "-c", RUN.format(hook=hook), *map(str, arguments)]


def run(
    *arguments: object, hook: str = "", text: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, hook=hook),
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def put_kernels(cache: Path) -> None:
    """Copy the kernels into an `XDG_CACHE_HOME` of a test's own, if there is a compiler."""
    if ops.cpu_kernels() is not None:
        for built in (build.cpu_library().parent, build.operator_library().parent):
            if built.is_relative_to(build.cache_directory()):  # not what a distribution brings
                shutil.copytree(built, cache / built.relative_to(build.user_cache().parent))


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run in this process; must fail with status 2 and one line on stderr, and say only that."""
    assert main([str(argument) for argument in arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line
