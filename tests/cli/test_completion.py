"""Completion as a shell asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete", reason="the completion extra is not installed")

#: Argcomplete writes to descriptor 8; here it is standard output.
RUN = "import os; os.dup2(1, 8); from internvl_edge.cli.main import main; main()"


def completed(line: str, cwd: Path) -> list[str]:
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "63",
    }
    ended = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, cwd=cwd, env=os.environ | asked
    )
    assert ended.returncode == 0, ended.stderr
    return sorted(word.strip() for word in ended.stdout.splitlines())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("internvl-edge ch", ["chat"]),
        ("internvl-edge ", ["bench", "build", "chat", "demo", "doctor", "export"]),
        ("internvl-edge bench la", ["latency"]),
        ("internvl-edge chat bundle --max-t", ["--max-tiles"]),
        ("internvl-edge chat bundle --device c", ["cpu", "cuda"]),
        ("internvl-edge chat bundle rec", ["receipt.png"]),
    ],
)
def test_words_are_completed(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "receipt.png").touch()
    assert completed(line, tmp_path)[: len(expected)] == expected


def test_nothing_is_completed_unless_a_shell_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("_ARGCOMPLETE", raising=False)
    code = (
        "import sys\nfrom internvl_edge.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'argcomplete' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
