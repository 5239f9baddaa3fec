"""What the CPU of a process can do, as it says itself: an emulator's host is not that CPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from internvl_edge.kernels import build, cpu
from internvl_edge.kernels.cpu import cpu_features, is_emulated, listed_features

CPUINFO = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu sse4_2 avx2 avx512f constant_tsc

processor\t: 1
flags\t\t: fpu
"""

#: NumPy's names of features that it and we know.
NUMPY_NAMES = {
    **{"SSSE3": "ssse3", "SSE41": "sse4_1", "SSE42": "sse4_2", "AVX": "avx", "F16C": "f16c"},
    **{"FMA3": "fma", "AVX2": "avx2", "AVX512F": "avx512f", "AVX512BW": "avx512bw"},
    **{"AVX512VL": "avx512vl", "AVX512VNNI": "avx512_vnni", "ASIMD": "asimd"},
    **{"ASIMDHP": "asimdhp", "ASIMDDP": "asimddp", "SVE": "sve"},
}


def numpy_features() -> dict[str, bool]:
    """What NumPy, which asks the CPU itself, finds."""
    core = getattr(np, "_core", None) or np.core
    found: dict[str, bool] = core._multiarray_umath.__cpu_features__
    return {ours: found[theirs] for theirs, ours in NUMPY_NAMES.items() if theirs in found}


def test_numpy_finds_the_same() -> None:
    wanted = numpy_features()
    assert len(wanted) > 10
    assert {name for name, there in wanted.items() if there} == set(cpu_features()) & set(wanted)


def test_the_system_lists_what_the_cpu_has() -> None:
    assert cpu._from_c_library("active") in (None, listed_features())
    assert not is_emulated()


def test_the_first_cpu_is_read(tmp_path: Path) -> None:
    assert listed_features(tmp_path) == set()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    assert listed_features(tmp_path) == {"sse4_2", "avx2", "avx512f"}


@pytest.fixture
def older_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that an emulator shows less than its host has."""
    monkeypatch.setattr(cpu, "listed_features", lambda: {"sse4_2", "avx2"})
    monkeypatch.setattr(cpu, "_from_c_library", lambda array: {"sse4_2"})


@pytest.mark.usefixtures("older_cpu")
def test_the_cpu_is_believed_and_not_the_list() -> None:
    assert cpu_features() == ["sse4_2"]
    assert is_emulated()


def test_the_list_is_taken_where_the_c_library_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "listed_features", lambda: {"sse4_2", "avx2"})
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())  # an older glibc
    assert cpu_features() == ["avx2", "sse4_2"]
    assert not is_emulated()


def test_a_cpu_without_a_list_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "listed_features", set)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(cpu.platform, "processor", lambda: "")
    assert cpu_features() == ["riscv64"]


TILE = """
import numpy as np
from internvl_edge.kernels import ops
from internvl_edge.kernels.cpu import cpu_features
pixels = np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3)
assert ops.cpu_kernels() is not None, "the compiled kernels are what is tried"
print(" ".join(cpu_features()))
print(ops.tile(pixels, columns=2, rows=3, tile_size=28).tobytes().hex())
"""


def tiled(command: list[str], tree: Path, cache: Path) -> list[str]:
    """Features and tiles in a process whose kernels are compiled there."""
    paths = [str(tree), *(path for path in sys.path if path)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XDG_CACHE_HOME": str(cache),
    }
    environment.pop("OPENBLAS_CORETYPE", None)  # names the host's CPU to NumPy where it is set
    done = subprocess.run(
        [*command, os.path.realpath(sys.executable), "-c", TILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[:2]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("qemu-x86_64-static") is None or platform.machine() != "x86_64",
    reason="qemu-x86_64-static is not installed, or this is no x86-64",
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_kernels_compiled_in_an_emulated_process_run_there(tmp_path: Path) -> None:
    """They were made for the host's CPU, and died of an illegal instruction."""
    tree = tmp_path / "tree"
    (tree / "internvl_edge").mkdir(parents=True)
    for room in ("bundle", "kernels", "runtime"):
        (tree / "internvl_edge" / room).symlink_to(build.SOURCES.parent / room)
    # One cache for both: neither takes what the other has compiled.
    native, emulated = (
        tiled(command, tree, tmp_path / "cache")
        for command in ([], ["qemu-x86_64-static", "-cpu", "Nehalem"])
    )
    assert "sse4_2" in emulated[0].split()
    assert "avx" not in emulated[0].split()
    assert emulated[1] == native[1]
