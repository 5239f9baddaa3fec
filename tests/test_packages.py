"""What pip installs: a wheel and an sdist hold all that the demo needs, and no tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import BLOCK

from internvl_edge.bundle.contract import MANIFEST

ROOT = Path(__file__).parents[1]
ROOMS = ("bench", "bundle", "calib_data", "cli", "examples", "export", "kernels", "runtime")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")

#: Ends of the names of modules, and of what they compile and open.
READ = (".py", ".cpp", ".h", ".cu", ".cuh", ".onnx")

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"

DEMO = """
import sys
{block}
import internvl_edge.cli.main as cli
assert cli.__file__.startswith(sys.argv[1]), cli.__file__
sys.exit(cli.main(["demo", "--device", "cpu", "--threads", "1"]))
"""


def built(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist as pip does, with the setuptools that is installed."""
    target.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind), target],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (found,) = target.iterdir()
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree to build in: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("tree")
    for name in (*ROOMS, *FILES):
        subprocess.run(["cp", "-r", ROOT / name, folder / name], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return built("wheel", tree, tree / "wheel")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Not from the sources, and without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    extras = ["onnx", "safetensors", "ml_dtypes", "tqdm", "torch", "transformers"]
    script = DEMO.format(block=BLOCK.format(names=extras))
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "site"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("(right)") == 2


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_what_they_read(wheel: Path) -> None:
    held = names(wheel)
    sources = {
        f"internvl_edge/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in READ
    }
    assert sources <= held
    for name in (
        "bench/answers/receipts.json",
        "bench/common/latency.schema.json",
        "runtime/py.typed",
        f"examples/tiny_ocr/bundle/{MANIFEST}",
        "examples/tiny_ocr/receipt.png",
    ):
        assert f"internvl_edge/{name}" in held
    assert not [name for name in held if name.startswith(("tests/", "internvl_edge/tests"))]


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(wheel: Path, tree: Path, tmp_path: Path) -> None:
    archive = built("sdist", tree, tree / "sdist")
    subprocess.run(["tar", "xzf", archive, "-C", tmp_path], check=True)
    (source,) = tmp_path.iterdir()
    assert names(built("wheel", source, tmp_path / "wheel")) == names(wheel)
