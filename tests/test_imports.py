"""Importing the runtime is light and silent, and the arrows between the folders point one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from checkpoints import GOLDEN

ROOT = Path(__file__).parents[1]

#: Never in a process that only runs bundles.
HEAVY = {"torch", "transformers", "onnx", "safetensors", "ml_dtypes", "tqdm"}
#: Needed to load a bundle, not to import the package.
LATE = {"onnxruntime", "sentencepiece"}

#: What each folder may import of the others.
ALLOWED = {
    "bundle": {"bundle"},
    "kernels": {"kernels"},
    "runtime": {"bundle", "kernels", "runtime"},
    "calib_data": {"bundle", "calib_data", "runtime"},
    "export": {"bundle", "calib_data", "export", "kernels", "runtime"},
    "bench": {"bench", "bundle", "calib_data", "examples", "export", "kernels", "runtime"},
    "cli": {"bench", "bundle", "calib_data", "cli", "export", "kernels", "runtime"},
}


def imported_by(code: str, *arguments: object) -> tuple[set[str], str]:
    """Top-level modules loaded after `code` in a fresh interpreter, and what it printed."""
    report = "\nimport sys, json\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    ended = subprocess.run(
        [sys.executable, "-c", code + report, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *printed, modules = ended.stderr.splitlines()
    return {name.split(".")[0] for name in json.loads(modules)}, ended.stdout + "".join(printed)


@pytest.mark.parametrize("module", ["bundle.manifest", "runtime", "cli.main", "cli.demo"])
def test_import_is_light_and_silent(module: str) -> None:
    loaded, printed = imported_by(f"import internvl_edge.{module}")
    assert loaded & (HEAVY | LATE) == set()
    assert printed == ""


def test_import_touches_no_export() -> None:
    code = (
        "import sys, internvl_edge.cli.main;"
        "assert not any(name.startswith('internvl_edge.export') for name in sys.modules)"
    )
    imported_by(code)


def test_answering_needs_nothing_heavy(golden_bundle: Path) -> None:
    code = (
        "import sys; from internvl_edge.runtime import InternVL;"
        "model = InternVL.load(sys.argv[1], device='cpu', threads=1);"
        "model.generate('What is this?', [sys.argv[2]], max_new_tokens=2)"
    )
    loaded, printed = imported_by(code, golden_bundle, GOLDEN / "images" / "img0.png")
    assert loaded & HEAVY == set()
    assert loaded >= LATE
    assert printed == ""


def test_exporting_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from internvl_edge.export.bundle import export_bundle;"
        "export_bundle(sys.argv[1], sys.argv[2])"
    )
    loaded, printed = imported_by(code, GOLDEN / "model", tmp_path / "bundle")
    assert loaded & {"torch", "transformers", "onnxruntime"} == set()
    assert printed == ""


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, inside its functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room: str) -> None:
    crossings = {
        (str(path.relative_to(ROOT)), name.split(".")[1])
        for path in sources(room)
        for name in imports(path)
        if name.startswith("internvl_edge.")
    }
    assert {item for item in crossings if item[1] not in ALLOWED[room]} == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {_name(path): path for room in ALLOWED for path in sources(room)}
    graph = {
        name: {found for found in imports(path) if found in modules} - {name}
        for name, path in modules.items()
    }
    # graphlib raises CycleError, which names the modules of the circle.
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["internvl_edge", *parts]).removesuffix(".__init__")


@pytest.mark.parametrize("room", ALLOWED)
def test_no_room_imports_the_tests(room: str) -> None:
    for path in sources(room):
        assert not {"tests", "conftest", "checkpoints"} & {
            name.split(".")[0] for name in imports(path)
        }


@pytest.mark.parametrize("room", ["runtime", "export", "bench", "cli"])
def test_the_check_reads_something(room: str) -> None:
    assert any("internvl_edge.bundle.errors" in set(imports(path)) for path in sources(room))


@pytest.mark.parametrize("room", ["bundle", "kernels", "runtime", "export", "cli"])
def test_training_libraries_are_never_named(room: str) -> None:
    """Not even inside a function, where the linter's ban would need a comment to be lifted."""
    for path in sources(room):
        assert not {"torch", "transformers"} & {name.split(".")[0] for name in imports(path)}
