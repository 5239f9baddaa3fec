"""The project with the lowest, the pinned and the newest versions of what it depends on.

    python tests/matrix/versions.py [--only lowest-3.10] [--python PATH] [--folder DIR]

For every Python that pyproject.toml names and this machine has, three environments are made below
build/version-matrix: `lowest` has the lowest versions with a wheel that pyproject.toml allows,
`pinned` those of constraints.txt, `newest` what pip chooses. An environment that has the versions
wanted is kept. Each then runs the steps of `matrix.smoke`. What cannot be run is said in a line;
the exit status is 1 if an environment cannot be made, if a step fails, or if time runs out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from matrix.smoke import NEEDS, STEPS

HERE = Path(__file__).parent
ROOMS = Path(__file__).parents[2]
PACKAGES = ("bench", "bundle", "calib_data", "cli", "examples", "export", "kernels", "runtime")
CONSTRAINTS = ROOMS / "constraints.txt"
KINDS = ("lowest", "pinned", "newest")
#: Required by one of ours, with a range of its own that is tried as well.
INDIRECT = {"protobuf": "onnx"}
#: All environments together, making one, and one step, in seconds.
BOUND_S, INSTALL_S, STEP_S = 3600, 600, 300
#: Only these are installed: what a user gets who has no compiler.
WHEELS = ("--only-binary", ":all:", "--quiet")

Pins = Mapping[str, str]


class Impossible(Exception):
    """An environment cannot be made; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A kind of versions on one Python.

    Attributes:
        kind: of `KINDS`.
        python: its version, such as 3.11.
        folder: where it lies.
    """

    kind: str
    python: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.python}"

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """File of the installed versions, written when all are."""
        return self.folder / "pins.json"


@dataclass
class Outcome:
    """What an environment gave: what each step said, and what is wrong by step."""

    pins: Pins
    said: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make and try all environments; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOMS / "build" / "version-matrix")
    parser.add_argument("--python", type=Path, action="append", default=[], help="an interpreter")
    parser.add_argument("--only", action="append", help="an environment, such as newest-3.13")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.resolve()
    project = tomllib.loads((ROOMS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _link_rooms(folder)
    started = time.monotonic()
    failed = False
    for python in supported_pythons(project):
        command = find_python(python, options.python)
        if command is None:
            print(f"Python {python:4} SKIPPED: not found (PATH, pyenv, --python)", flush=True)
            continue
        for kind in KINDS:
            environment = Environment(kind, python, folder / f"{kind}-{python}")
            if options.only and environment.name not in options.only:
                continue
            left = BOUND_S - (time.monotonic() - started)
            failed |= _run(environment, command, requirements(project), left)
    return int(failed)


def requirements(project: Mapping[str, Any]) -> list[Requirement]:
    """Return what the runtime and the exporter depend on, by pyproject.toml's `project` table."""
    merged: dict[str, Requirement] = {}
    for line in project["dependencies"] + project["optional-dependencies"]["export"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in merged:
            merged[name].specifier &= requirement.specifier
        else:
            merged[name] = requirement
    return list(merged.values())


def supported_pythons(project: Mapping[str, Any]) -> list[str]:
    """Return the versions of Python that the classifiers name, such as 3.10."""
    words = (entry.rsplit(" :: ", 1) for entry in project["classifiers"])
    return [last for first, last in words if first == "Programming Language :: Python"]


def find_python(version: str, given: Sequence[Path]) -> Path | None:
    """Find an interpreter of this version; what is given goes before what is on the machine."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    on_path = shutil.which(f"python{version}")
    candidates = [*given, Path(sys.executable), *([Path(on_path)] if on_path else [])]
    for candidate in (*candidates, *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        # A pyenv shim is there for versions that are not active, and fails.
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    return None


def lowest_allowed(requirement: Requirement, versions: Sequence[str]) -> Iterator[str]:
    """Yield the versions that a requirement allows, lowest first."""
    return map(str, sorted(map(Version, requirement.specifier.filter(versions))))


def pinned(wanted: Sequence[Requirement], constraints: str, python: str) -> Pins:
    """Return the versions that constraints.txt has for these packages on this Python.

    Raises:
        Impossible: it has none for one of them.
    """
    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    found = {
        canonicalize_name(line.name): next(iter(line.specifier)).version
        for line in map(Requirement, lines)
        if line.marker is None or line.marker.evaluate({"python_version": python})
    }
    missing = [r.name for r in wanted if canonicalize_name(r.name) not in found]
    if missing:
        raise Impossible(f"constraints.txt pins no {', '.join(missing)} for Python {python}")
    names = [canonicalize_name(name) for name in (*(r.name for r in wanted), *INDIRECT)]
    return {name: found[name] for name in names if name in found}


def _run(environment: Environment, command: Path, wanted: list[Requirement], left: float) -> bool:
    """Make one environment and run its steps; return whether something is wrong."""
    started = time.monotonic()
    if left <= 0:
        print(f"{environment.name:13} NOT RUN: the bound of {BOUND_S} s is used up", flush=True)
        return True
    try:
        pins = _make(environment, command, wanted)
    except Impossible as error:
        # Not every Python has pins, but what pyproject.toml allows can be installed.
        word = "SKIPPED" if environment.kind == "pinned" else "CANNOT BE MADE"
        print(f"{environment.name:13} {word}: {error}", flush=True)
        return environment.kind != "pinned"
    outcome = Outcome(pins)
    _try(environment, outcome, started + left)
    outcome.seconds = time.monotonic() - started
    shown = [canonicalize_name(name) for name in (*(r.name for r in wanted), *INDIRECT)]
    print(render(environment, outcome, shown), flush=True)
    return bool(outcome.wrong)


def render(environment: Environment, outcome: Outcome, shown: Sequence[str]) -> str:
    """Return what is printed of an environment: verdict, versions, and each step."""
    verdict = "WRONG" if outcome.wrong else "right"
    versions = ", ".join(f"{name} {outcome.pins[name]}" for name in shown if name in outcome.pins)
    right = ", ".join(f"{step} ({said})" if said else step for step, said in outcome.said.items())
    return "\n".join(
        [
            f"{environment.name:13} {verdict} ({outcome.seconds:.0f} s): {versions}",
            f"    ok: {right or 'nothing'}",
            *(f"    FAILED {step}: {reason}" for step, reason in outcome.wrong.items()),
        ]
    )


def _make(environment: Environment, command: Path, wanted: Sequence[Requirement]) -> Pins:
    """Install what is wanted unless it is there; return all versions.

    Raises:
        Impossible: there is no such set of versions, or it does not install.
    """
    asked = {
        "requirements": list(map(str, wanted)),
        "constraints": CONSTRAINTS.read_text(encoding="utf-8"),
    }
    there = json.loads(environment.stamp.read_text()) if environment.stamp.exists() else {}
    # The newest are asked for each time: the registry may have others by now.
    if environment.kind != "newest" and there.get("asked") == asked:
        kept: Pins = there["pins"]
        return kept
    if not environment.interpreter.exists():
        _create(environment, command)
    pins = _choose(environment, wanted)
    if there.get("pins") != pins:
        _create(environment, command)
        lines = [f"{name}=={version}" for name, version in pins.items()]
        _pip(environment, "install", "--no-deps", *WHEELS, *lines)
    environment.stamp.write_text(json.dumps({"asked": asked, "pins": pins}, indent=2))
    return pins


def _create(environment: Environment, command: Path) -> None:
    """Make an empty environment; what was there goes."""
    shutil.rmtree(environment.folder, ignore_errors=True)
    _output(command, "-m", "venv", environment.folder)


def _choose(environment: Environment, wanted: Sequence[Requirement]) -> Pins:
    """Return the versions of an environment's kind, of indirect dependencies too."""
    if environment.kind == "newest":
        return _resolve(environment, list(map(str, wanted)))[0]
    if environment.kind == "pinned":
        pins = pinned(wanted, CONSTRAINTS.read_text(encoding="utf-8"), environment.python)
        return _resolve(environment, [f"{name}=={version}" for name, version in pins.items()])[0]
    chosen = [_lowest(environment, requirement) for requirement in wanted]
    _, requires = _resolve(environment, chosen)
    for name, reader in INDIRECT.items():
        ranges = [
            r for r in map(Requirement, requires[reader]) if canonicalize_name(r.name) == name
        ]
        chosen += [_lowest(environment, requirement) for requirement in ranges]
    return _resolve(environment, chosen)[0]


def _lowest(environment: Environment, requirement: Requirement) -> str:
    """Return the lowest version that a requirement allows and that has a wheel."""
    listed = _pip(environment, "index", "versions", requirement.name)
    line = next(line for line in listed.splitlines() if line.startswith("Available versions: "))
    for version in lowest_allowed(requirement, line.split(": ")[1].split(", ")):
        pin = f"{requirement.name}=={version}"
        try:
            _resolve(environment, [pin], "--no-deps")
        except Impossible:
            continue
        return pin
    raise Impossible(f"no version of {requirement} has a wheel for this Python")


def _resolve(
    environment: Environment, wanted: Sequence[str], *options: str
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the versions that pip would install, and what each of them requires."""
    report = ("--dry-run", "--ignore-installed", "--report", "-")
    printed = _pip(environment, "install", *report, *WHEELS, *options, *wanted)
    found = [item["metadata"] for item in json.loads(printed)["install"]]
    named = sorted((canonicalize_name(item["name"]), item) for item in found)
    versions: dict[str, str] = {name: item["version"] for name, item in named}
    return versions, {name: item.get("requires_dist", []) for name, item in named}


def _pip(environment: Environment, *arguments: str) -> str:
    """Run pip in an environment; return what it prints."""
    return _output(environment.interpreter, "-m", "pip", *arguments)


def _output(*command: str | Path) -> str:
    """Return what a command prints.

    Raises:
        Impossible: it fails, or takes too long.
    """
    called = " ".join(map(str, command[1:4]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Impossible(f"{called} is not done within {INSTALL_S} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Impossible(f"{called}: {' '.join(errors) or done.stderr.strip() or done.stdout}")
    return done.stdout


def _link_rooms(folder: Path) -> None:
    """Make a tree that is imported as it stands: installing would write into the source."""
    links = folder / "tree" / "internvl_edge"
    links.mkdir(parents=True, exist_ok=True)
    for room in PACKAGES:
        (links / room).unlink(missing_ok=True)
        (links / room).symlink_to(ROOMS / room)


def _try(environment: Environment, outcome: Outcome, until: float) -> None:
    """Run all steps, each in a process of its own, with a cache of the environment's own."""
    work = environment.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    variables = {
        **os.environ,
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(environment.folder.parent / "tree"),
        "PYTHONNOUSERSITE": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
    }
    smoke = [str(environment.interpreter), str(HERE / "smoke.py"), str(work)]
    commands = {
        "pip check": [str(environment.interpreter), "-m", "pip", "check"],
        **{step: [*smoke, step] for step in STEPS},
    }
    for step, command in commands.items():
        if (needed := NEEDS.get(step)) in outcome.wrong:
            outcome.wrong[step] = f"not run after {needed}"
        else:
            _step(step, command, variables, outcome, min(STEP_S, until - time.monotonic()))


def _step(
    step: str, command: list[str], variables: Mapping[str, str], outcome: Outcome, seconds: float
) -> None:
    """Run one step and note what it said or what is wrong."""
    if seconds <= 0:
        outcome.wrong[step] = f"not run: the bound of {BOUND_S} s is used up"
        return
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        outcome.wrong[step] = f"not done within {seconds:.0f} s"
        return
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        outcome.wrong[step] = f"exit status {done.returncode}: {output[-1]}"
    else:
        outcome.said[step] = json.loads(done.stdout)["said"] if step in STEPS else ""


if __name__ == "__main__":
    sys.exit(main())
