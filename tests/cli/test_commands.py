"""The table of commands: each is where it says, helps, and is imported when it is typed."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from command_line import BLOCK, error_line, run

from internvl_edge.cli import main as command_line
from internvl_edge.cli.commands import BENCH, COMMANDS, RENAMED, Command
from internvl_edge.cli.main import main

PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.md"


def commands(command: Command = COMMANDS, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command's words behind the program's name."""
    for name, part in command.parts.items():
        yield (*path, name)
        yield from commands(part, (*path, name))


def found(path: tuple[str, ...]) -> Command:
    command = COMMANDS
    for name in path:
        command = command.parts[name]
    return command


@pytest.mark.parametrize("path", [*commands()], ids=" ".join)
def test_a_command_is_where_the_table_says(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = found(path)
    if command.module is not None:
        module = importlib.import_module(f"internvl_edge.{command.module}")
        assert callable(module.add_arguments)
        assert callable(module.run)
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    assert ended.value.code == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.startswith(f"usage: internvl-edge {' '.join(path)} ")
    assert all(part.help.split()[0] in output for part in command.parts.values())
    assert all(name in output for name in command.parts)


@pytest.mark.parametrize("words", [(), ("bench",)], ids=len)
def test_the_list_of_commands_imports_none_of_them(words: tuple[str, ...]) -> None:
    code = (
        "import sys, json\nfrom internvl_edge.cli.main import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\n"
        "except SystemExit:\n    print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(ended.stderr))
    assert not loaded & {"numpy", "PIL", "onnx", "onnxruntime"}
    rooms = {name.split(".")[1] for name in loaded if name.startswith("internvl_edge.")}
    assert rooms == {"bundle", "cli"}
    assert "accuracy" in ended.stdout if words else "chat" in ended.stdout


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_says_the_new_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "bench", name, "BUNDLE", "--json")
    assert line == f"error: 'bench {name}' is now 'bench {RENAMED[name]}'"
    assert found(("bench", *RENAMED[name].split())).module is not None
    assert name not in BENCH


@pytest.mark.parametrize("words", [["bench"], ["bench", "fly"], ["--", "chat"], ["-x", "chat"]])
def test_no_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: internvl-edge" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("bench",)], ids=len)
def test_without_a_word_everything_is_listed(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    output, errors = capsys.readouterr()
    assert output == ""
    assert all(name in errors for name in found(words).parts)


@pytest.mark.parametrize("path", [(), ("chat",), ("bench", "latency")], ids=" ".join)
def test_help_may_be_asked_for_by_a_word(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for words in (["help", *path], [*path, "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("chatt", "there is no command 'chatt'; did you mean 'chat'?"),
        ("bench latncy", "there is no command 'latncy'; did you mean 'latency'?"),
        ("--hlp", "arguments: --hlp"),
        ("-V", "arguments: -V"),
        (
            "chat --max_tiles 3 B",
            "unrecognized arguments: --max_tiles; did you mean '--max-tiles'?",
        ),
        ("chat B --tiles=3", "arguments: --tiles=3; did you mean '--max-tiles'?"),
    ],
)
def test_a_word_mistyped(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside it stands what the command takes, without its twenty options."""
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: internvl-edge ")
    assert ": error: " in line
    assert line.endswith(said)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"internvl-edge {metadata.version('internvl-edge')}\n"


def test_pictures_are_not_called_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["chat"])
    assert capsys.readouterr().err.endswith("arguments are required: BUNDLE\n")


def test_a_file_may_be_called_like_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "compare is not a bundle" in error_line(capsys, "bench", "latency", "./compare")


def test_a_document_lists_the_subjects_of_bench() -> None:
    table = PERFORMANCE.read_text(encoding="utf-8").split("| `internvl-edge bench …` | answers |")[
        1
    ]
    rows = table.split("\n\n")[0].splitlines()[2:]
    listed = [name for row in rows for name in re.findall("`([a-z ]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(" ".join(path[1:]) for path in commands() if path[1:])


@pytest.mark.parametrize(
    "words",
    [
        "prepare B",
        "build B",
        "bench accuracy",
        "bench accuracy fidelity B --reference B",
        "bench accuracy layerwise B",
        "bench latency B",
        "bench memory B",
        "bench estimate B",
        "bench scale internvl-chat-v1-5 -o B",
        "bench kernels precision",
        "bench kernels engines",
        "bench peers",
    ],
)
def test_without_its_extra_a_command_names_it(words: str) -> None:
    names = ["onnx", "safetensors", "ml_dtypes", "tqdm", "scipy"]
    ended = run(*words.split(), hook=BLOCK.format(names=names))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    subjects = ("estimate", "scale", "kernels")
    extra = dict.fromkeys(subjects, "bench") | {"layerwise": "train", "peers": "peers"}
    (named,) = {value for key, value in extra.items() if key in words} or {"export"}
    assert line.startswith("error: this command needs the package ")
    assert line.endswith(f": pip install 'internvl-edge[{named}]'")


@pytest.mark.parametrize("name", ["export", "prepare", "build"])
def test_help_of_the_main_commands_needs_no_extra(name: str) -> None:
    ended = run(name, "--help", hook=BLOCK.format(names=["onnx", "safetensors", "tqdm"]))
    assert (ended.returncode, ended.stderr) == (0, "")


#: Run with a module's name and code that imports it: Ctrl-C is typed while it is.
INTERRUPTED = """
import importlib.abc, os, signal, sys

_, wanted, code = sys.argv

class Interrupted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # where a signal that is not held would be seen

sys.meta_path.insert(0, Interrupted())
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    exec(code)
except KeyboardInterrupt:
    print("interrupted", "after" if wanted in sys.modules else "within")
"""


def interrupted(module: str, code: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run with so many threads of NumPy's BLAS: the second takes signals that the first holds."""
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, code],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads)},
    )


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("onnxruntime", "from internvl_edge.runtime.backends import ort; ort.load_onnxruntime()"),
        ("tokenizers", "from internvl_edge.bundle import byte_pairs; byte_pairs.load_tokenizers()"),
        (
            "sentencepiece",
            "from internvl_edge.bundle import sentence_pieces as s; s._processor(b'')",
        ),
        ("pypdfium2", "from internvl_edge.runtime.images.decode import *; load_pixels(b'%PDF')"),
        ("av", "from internvl_edge.runtime import *; video_frames('x')"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_signals_wait_for_libraries_that_are_imported_late(
    module: str, code: str, threads: int
) -> None:
    """Half of ONNX Runtime was an ImportError in a traceback."""
    pytest.importorskip(module)
    ended = interrupted(module, code, threads)
    assert ended.stderr == ""
    assert ended.stdout == "interrupted after\n"


def test_ctrl_c_before_the_first_command_line() -> None:
    """Whoever mistypes ends a command at once, while Python still imports."""
    code = "from internvl_edge.cli.start import main; sys.argv = ['x', 'doctor']; sys.exit(main())"
    ended = interrupted("argparse", code)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.strip() == "interrupted"


def test_signals_wait_for_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that were interrupted while they began ended in an abort or a crash."""
    masks, imported = [], command_line.import_module

    def watched(name: str) -> ModuleType:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return imported(name)

    monkeypatch.setattr(command_line, "import_module", watched)
    assert command_line.main(["doctor"]) == 0
    assert {signal.SIGINT, signal.SIGTERM} <= masks[0]
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, [])
