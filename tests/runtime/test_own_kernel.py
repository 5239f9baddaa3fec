"""Kernels of ours are tried before they are trusted; what was right is not tried at every start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from internvl_edge.kernels.build import BuildError, operator_library
from internvl_edge.runtime.backends import machine, own_kernel, trials
from internvl_edge.runtime.backends.attention import ATTENTION
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.own_kernel import KernelKind, OwnKernel
from internvl_edge.runtime.backends.tower import TOWER

#: What the smallest error is that must be noticed.
ERRORS: dict[KernelKind, Callable[[Any], Any]] = {
    ATTENTION: lambda value: value + 0.01,
    BLOCKS: lambda value: value + 1,
    TOWER: lambda value: np.nextafter(value, 9),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that remembers nothing yet; the library is the user's."""
    monkeypatch.setattr(trials, "user_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache/trials"


@pytest.fixture(params=list(ERRORS), ids=lambda kind: kind.room)
def kind(request: pytest.FixtureRequest) -> KernelKind:
    found: KernelKind = request.param
    if (kernel := own_kernel.own_kernel(found)).library is None:
        pytest.skip(kernel.name)
    return found


def started(kind: KernelKind) -> OwnKernel:
    """What another process would find."""
    return own_kernel.own_kernel.__wrapped__(kind)


class Counted:
    """A kind of kernel whose trials are counted, and come out as told."""

    def __init__(self, kind: KernelKind) -> None:
        self.trials, self.outcome = 0, True
        self.kind = replace(kind, is_right=self._is_right)

    def _is_right(self, kernel: OwnKernel) -> bool:
        self.trials += 1
        return self.outcome


def test_a_second_start_opens_nothing(kind: KernelKind, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_none(*arguments: object, **options: object) -> None:
        raise AssertionError("a trial")

    first = started(kind)
    assert first.library is not None
    monkeypatch.setattr("onnxruntime.InferenceSession", open_none)
    assert started(kind) == first


def other_version(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    monkeypatch.setattr(machine, "load_onnxruntime", lambda: SimpleNamespace(__version__="9.9"))
    return kind


def other_build(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    monkeypatch.setattr(ort, "get_build_info", lambda: "another of the same version")
    return kind


def other_cpu(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    monkeypatch.setattr(machine, "cpu_features", lambda: ["another"])
    return kind


def other_library(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    library = Path(shutil.copy(operator_library(), folder / "library.so"))
    with library.open("ab") as file:
        file.write(b"\0")  # still the same to whoever loads it
    monkeypatch.setattr(own_kernel, "built_library", lambda: library)
    return kind


def other_probe(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    (folder / "probe").write_bytes(kind.probes[0].read_bytes() + b"\0")
    return replace(kind, probes=(folder / "probe", *kind.probes[1:]))


def other_nodes(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    return replace(kind, give=lambda model: model + b"\0")


def other_code(kind: KernelKind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KernelKind:
    monkeypatch.setattr(trials, "_code", lambda: b"another")
    return kind


@pytest.mark.parametrize(
    "changed",
    [
        *(other_version, other_build, other_cpu),
        *(other_library, other_probe, other_nodes, other_code),
    ],
)
def test_it_is_tried_again_when_one_input_changes(
    kind: KernelKind,
    changed: Callable[[KernelKind, Path, pytest.MonkeyPatch], KernelKind],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Counted(kind)
    for _ in range(2):
        started(counted.kind)
    assert counted.trials == 1
    started(changed(counted.kind, tmp_path, monkeypatch))
    assert counted.trials == 2


def test_what_is_damaged_or_anothers_is_no_memory(kind: KernelKind, cache: Path) -> None:
    started(Counted(ATTENTION if kind != ATTENTION else BLOCKS).kind)
    (foreign,) = cache.iterdir()
    counted = Counted(kind)
    started(counted.kind)
    (remembered,) = set(cache.iterdir()) - {foreign}
    content = remembered.read_bytes()
    damaged = (foreign.read_bytes(), b"", b"\xff\xfe", content[:-1], b"wrong" + content[5:])
    for number, found in enumerate(damaged, 2):
        remembered.write_bytes(found)
        assert started(counted.kind).library is not None
        assert counted.trials == number
        assert remembered.read_bytes() == content


def test_what_was_wrong_is_tried_at_the_next_start(kind: KernelKind, cache: Path) -> None:
    counted = Counted(kind)
    counted.outcome = False
    for number in (1, 2):
        assert started(counted.kind).library is None
        assert counted.trials == number
    assert not cache.exists()
    counted.outcome = True
    assert started(counted.kind).library is not None


def test_a_lack_of_memory_is_tried_at_the_next_start(
    kind: KernelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime.InferenceSession", no_memory)
        assert started(kind).library is None
    assert started(kind).library is not None


def test_a_cache_that_cannot_be_written_costs_no_kernel(kind: KernelKind, cache: Path) -> None:
    cache.parent.write_text("a file where the folder belongs")
    counted = Counted(kind)
    for number in (1, 2):
        assert started(counted.kind).library is not None
        assert counted.trials == number


def test_a_kernel_that_is_wrong_is_not_used(
    kind: KernelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(ort.InferenceSession):  # type: ignore[misc]
        def run(self, *given: object) -> list[NDArray[Any]]:
            first, *others = super().run(*given)
            first[-1, -1] = ERRORS[kind](first[-1, -1])
            return [first, *others]

    monkeypatch.setattr("onnxruntime.InferenceSession", Wrong)
    found = started(kind)
    assert found.library is None
    assert found.name.endswith(f"does not run it, or not {kind.verdict}")


@pytest.mark.parametrize("kind", list(ERRORS), ids=lambda kind: kind.room)
def test_a_library_of_no_use_is_said(
    kind: KernelKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.so").write_bytes(b"no library")
    monkeypatch.setattr(own_kernel, "built_library", lambda: tmp_path / "damaged.so")
    assert started(kind).name.startswith("no library (")


def test_without_a_compiler_one_build_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def no_compiler() -> Path:
        builds.append(1)
        raise BuildError("no C++ compiler found\nand more")

    monkeypatch.setattr(own_kernel, "operator_library", no_compiler)
    own_kernel.built_library.cache_clear()
    try:
        said = {started(kind).name for kind in ERRORS}
    finally:
        own_kernel.built_library.cache_clear()
    assert said == {"no library (no C++ compiler found)"}
    assert len(builds) == 1


def test_a_cpu_without_instructions_for_it_leaves_it(
    kind: KernelKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        own_kernel, "OperatorLibrary", lambda path, room: SimpleNamespace(paths=["plain"])
    )
    found = started(kind)
    assert (found.library is not None) == kind.on_any_cpu
    assert found.name == ("plain" if kind.on_any_cpu else "this CPU has no instructions for it")
