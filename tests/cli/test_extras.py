"""The extra that a command names brings what the command imports."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from internvl_edge.cli.commands import COMMANDS, Command

pytestmark = pytest.mark.slow(seconds=1)

#: Run with the command's module, then the distributions that are there.
IMPORT = """
import importlib, importlib.abc, importlib.metadata, re, sys

module, *there = sys.argv[1:]
packages = importlib.metadata.packages_distributions()
canonical = lambda name: re.sub("[-_.]+", "-", name).lower()

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        owners = packages.get(name.partition(".")[0], ())
        if owners and not {canonical(one) for one in owners} & set(there):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
importlib.import_module(f"internvl_edge.{module}")
"""


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def commands(command: Command = COMMANDS) -> Iterator[tuple[str, str | None]]:
    if command.module is not None:
        yield command.module, command.extra
    for part in command.parts.values():
        yield from commands(part)


@cache
def brought(name: str, extra: str | None = None) -> frozenset[str]:
    """Every distribution that is installed with one; extras of others are not followed."""
    found = {canonical(name)}
    try:
        told = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return frozenset(found)
    for line in told:
        requirement, _, marker = line.partition(";")
        if "extra" in marker and (extra is None or f'"{extra}"' not in marker.replace("'", '"')):
            continue
        parts = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement.strip())
        assert parts is not None
        for wanted in (parts[2] or "").split(","):
            if canonical(parts[1]) == "internvl-edge" or not wanted:
                found |= brought(parts[1], wanted or None)
    return frozenset(found)


@pytest.mark.parametrize(("module", "extra"), [*commands()])
def test_the_extra_brings_what_is_imported(module: str, extra: str | None) -> None:
    there = brought("internvl-edge", extra)
    assert {"numpy", "onnxruntime", "pillow", "sentencepiece"} <= there
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT, module, *sorted(there)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr.splitlines()[-1]
