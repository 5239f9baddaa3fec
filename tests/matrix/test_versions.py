"""The version matrix reads ranges and pins as they are meant, and notices what goes wrong."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from internvl_edge.runtime.backends.ort import TRIED

versions = pytest.importorskip("matrix.versions", reason="tomllib came with Python 3.11")

ROOMS = Path(__file__).parents[2]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
CONSTRAINTS = """\
# What CI tests with.
numpy==2.4.6; python_version >= "3.11"
ml_dtypes==0.6.0
onnx==1.23.2
protobuf==7.36.2
scipy==1.17.1
"""


@pytest.fixture
def project() -> dict[str, Any]:
    text = (ROOMS / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = versions.tomllib.loads(text)["project"]
    return table


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    return versions.Environment("newest", HERE, tmp_path)


def test_runtime_and_export_are_required(project: dict[str, Any]) -> None:
    names = {requirement.name for requirement in versions.requirements(project)}
    assert names >= {"numpy", "onnxruntime", "onnx", "safetensors"}
    assert not names & {"torch", "pytest", "internvl-edge"}


def test_pythons_are_those_of_the_classifiers() -> None:
    first = "Programming Language :: Python"
    table = {"classifiers": [f"{first} :: 3.10", f"{first} :: 3.13", "License :: OSI Approved"]}
    assert versions.supported_pythons(table) == ["3.10", "3.13"]


def test_the_projects_own_pins_are_in_its_ranges(project: dict[str, Any]) -> None:
    """For every Python that has all pins; there is one."""
    wanted = versions.requirements(project)
    constraints = (ROOMS / "constraints.txt").read_text(encoding="utf-8")
    pinned = 0
    for python in versions.supported_pythons(project):
        try:
            pins = versions.pinned(wanted, constraints, python)
        except versions.Impossible:
            continue
        pinned += 1
        for requirement in wanted:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
    assert pinned


def test_the_runtime_warns_below_what_pyproject_allows(project: dict[str, Any]) -> None:
    (wanted,) = (r for r in versions.requirements(project) if r.name == "onnxruntime")
    (lowest,) = (clause.version for clause in wanted.specifier if clause.operator == ">=")
    assert Version(TRIED[0]) == Version(lowest)


def test_a_package_asked_for_twice_has_one_range() -> None:
    """One for the runtime and a narrower one for the exporter: both hold."""
    table = {
        "dependencies": ["pillow>=9.5", "numpy<3"],
        "optional-dependencies": {"export": ["Pillow>=10.1,<14"]},
    }
    merged = versions.requirements(table)
    assert [r.name for r in merged] == ["pillow", "numpy"]
    assert list(versions.lowest_allowed(merged[0], ["9.5", "13.0", "10.1", "14.0"])) == [
        "10.1",
        "13.0",
    ]


def test_the_lowest_come_first_and_only_those_allowed() -> None:
    listed = ["1.32.0", "1.9.0", "1.22.1", "1.31.0rc1", "1.22.0", "1.25.0", "1.30.0"]
    allowed = versions.lowest_allowed(Requirement("x>=1.22,<1.32,!=1.25.*"), listed)
    assert list(allowed) == ["1.22.0", "1.22.1", "1.30.0"]


def test_pins_are_this_pythons() -> None:
    wanted = [Requirement("numpy>=1.26"), Requirement("ml-dtypes>=0.5")]
    pins = versions.pinned(wanted, CONSTRAINTS, "3.12")
    assert pins == {"numpy": "2.4.6", "ml-dtypes": "0.6.0", "protobuf": "7.36.2"}


@pytest.mark.parametrize(("name", "python"), [("numpy", "3.10"), ("tqdm", "3.12")])
def test_a_missing_pin_is_named(name: str, python: str) -> None:
    with pytest.raises(versions.Impossible, match=f"pins no {name} for Python {python}"):
        versions.pinned([Requirement("onnx"), Requirement(name)], CONSTRAINTS, python)


def test_the_python_that_is_given_goes_first(tmp_path: Path) -> None:
    mine = tmp_path / "python"
    mine.symlink_to(sys.executable)
    assert versions.find_python(HERE, [mine]) == mine
    assert versions.find_python(HERE, []) == Path(sys.executable)


def test_a_python_of_another_version_is_not_taken() -> None:
    assert versions.find_python("2.5", [Path(sys.executable)]) is None


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        ('print(\'{"said": "all of it"}\')', "all of it", None),
        ("raise ValueError('what it was')", None, "exit status 1: ValueError: what it was"),
        ("import os; os.kill(os.getpid(), 9)", None, "exit status -9: no output"),
    ],
)
def test_what_a_step_says(code: str, said: str | None, wrong: str | None) -> None:
    outcome = versions.Outcome({})
    versions._step("demo", [sys.executable, "-c", code], {}, outcome, 60)
    assert outcome.said.get("demo") == said
    assert outcome.wrong.get("demo") == wrong


def test_a_step_that_hangs_is_stopped() -> None:
    outcome = versions.Outcome({})
    code = "import time; time.sleep(600)"
    versions._step("demo", [sys.executable, "-c", code], {}, outcome, 0.2)
    assert "not done within" in outcome.wrong["demo"]


def test_steps_beyond_the_bound_and_after_a_failure_are_not_run(
    environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rests on a failed export is left out; nothing that was not run counts as right."""
    ran = []

    def step(name: str, *rest: Any) -> None:
        ran.append(name)
        if name == "export fp32":
            rest[2].wrong[name] = "exit status 1"

    monkeypatch.setattr(versions, "_step", step)
    outcome = versions.Outcome({})
    versions._try(environment, outcome, time.monotonic() + 60)
    assert "prepare fp32" not in ran
    assert outcome.wrong["prepare fp32"] == "not run after export fp32"
    assert "prepare int8-int8" in ran
    monkeypatch.undo()
    outcome = versions.Outcome({})
    versions._try(environment, outcome, time.monotonic() - 1)
    assert set(outcome.wrong) == {"pip check", *versions.STEPS}


def test_an_environment_with_the_same_versions_is_kept(
    environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    chosen = {"numpy": "2.4.6"}

    def create(environment: Any, command: Path) -> None:
        made.append(environment.name)
        environment.interpreter.parent.mkdir(parents=True, exist_ok=True)
        environment.interpreter.touch()

    monkeypatch.setattr(versions, "_create", create)
    monkeypatch.setattr(versions, "_choose", lambda *_: dict(chosen))
    monkeypatch.setattr(versions, "_pip", lambda *_: "")
    wanted = [Requirement("numpy>=1.26")]
    assert versions._make(environment, Path(sys.executable), wanted) == chosen
    made.clear()
    versions._make(environment, Path(sys.executable), wanted)
    assert made == []
    chosen["numpy"] = "2.5.0"
    assert versions._make(environment, Path(sys.executable), wanted) == chosen
    assert made == [environment.name]


def test_what_failed_is_printed(environment: Any) -> None:
    outcome = versions.Outcome({"numpy": "2.4.6", "flatbuffers": "25.1"}, seconds=12)
    outcome.said |= {"images": "", "golden": "logits 4e-05 away"}
    outcome.wrong["demo"] = "exit status 1"
    assert versions.render(environment, outcome, ["numpy"]).splitlines() == [
        f"newest-{HERE:6} WRONG (12 s): numpy 2.4.6",
        "    ok: images, golden (logits 4e-05 away)",
        "    FAILED demo: exit status 1",
    ]
