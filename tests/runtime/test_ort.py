"""ONNX Runtime is imported without telemetry, and its version is said where it was not tried."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import onnxruntime
import pytest
from command_line import put_kernels

from internvl_edge.runtime import VersionWarning
from internvl_edge.runtime.backends import ort as ort_module
from internvl_edge.runtime.backends.ort import TELEMETRY_OFF, TRIED, is_tried, load_onnxruntime

ROOT = Path(__file__).parents[2]


def home_of(tmp_path: Path, code: str, **variables: str) -> tuple[list[str], str]:
    """Files below a fresh home after `code` has run there, and what it printed."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XDG_CACHE_HOME", TELEMETRY_OFF)
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    return files, done.stdout


#: The demo, then the sockets this process holds: native code's too.
DEMO_AND_SOCKETS = """
import os
from internvl_edge.cli.main import main
assert main(["demo", "--device", "cpu", "--threads", "1"]) == 0
for fd in os.listdir("/proc/self/fd"):
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        continue  # the listing's own
    if target.startswith("socket:"):
        print("SOCKET", target)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to see sockets in")
def test_a_demo_leaves_no_telemetry_and_opens_no_socket(tmp_path: Path) -> None:
    put_kernels(tmp_path / ".cache")
    files, printed = home_of(tmp_path, DEMO_AND_SOCKETS)
    assert "all answers are right" in printed
    assert "SOCKET" not in printed
    assert any("kernels" not in file for file in files)
    assert all(file.startswith(".cache/internvl-edge/") for file in files)


def test_a_variable_that_the_user_has_set_stays(tmp_path: Path) -> None:
    code = (
        "import os; from internvl_edge.runtime.backends.ort import load_onnxruntime;"
        f" load_onnxruntime(); print(os.environ['{TELEMETRY_OFF}'])"
    )
    assert home_of(tmp_path, code)[1].strip() == "1"
    assert home_of(tmp_path, code, **{TELEMETRY_OFF: "0"})[1].strip() == "0"


def test_there_is_one_import_of_onnxruntime() -> None:
    """Elsewhere only for type checkers: any other could come first, with telemetry on."""
    importing = set()
    for room in ("bundle", "runtime", "export", "bench", "calib_data", "kernels", "cli"):
        for path in (ROOT / room).rglob("*.py"):
            if _imports_onnxruntime(path):
                importing.add(str(path.relative_to(ROOT)))
    assert importing == {"runtime/backends/ort.py"}


def _imports_onnxruntime(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    ]
    return any(name.split(".")[0] == "onnxruntime" for name in names)


@pytest.mark.parametrize(
    ("version", "tried"),
    [
        (TRIED[0], True),
        (TRIED[1], True),
        ("1.31.1", True),
        ("1.32.0.dev20261101", True),
        ("1.5.2", False),
        ("9.0.0", False),
        ("nightly", False),
    ],
)
def test_which_versions_were_tried(version: str, tried: bool) -> None:
    assert is_tried(version) is tried


def test_another_version_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("onnxruntime")
    monkeypatch.setattr(other, "__version__", "9.0.0", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", other)
    load = ort_module.load_onnxruntime.__wrapped__
    with pytest.warns(VersionWarning, match=re.escape("onnxruntime 9.0.0") + f".*{TRIED[1]}"):
        assert load() is other


def test_the_one_installed_is_the_one_given() -> None:
    assert load_onnxruntime() is onnxruntime
