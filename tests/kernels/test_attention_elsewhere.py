"""Attention on CPUs we do not have, by emulation, and under AddressSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from attention_cases import DTYPES, HEADS, SIZES, Case, case, check
from elsewhere import SANITIZED, compiled, on_aarch64, on_x86

from internvl_edge.kernels.attention.library import KINDS

RUNNER = Path(__file__).with_name("attention_runner.cpp")
#: Cached positions, new rows, and free ones: on both sides of blocks, runs and tiles.
PLACES = (
    *([(0, 1, 0)], [(127, 1, 0), (128, 1, 2)], [(0, 33, 1), (9, 4, 0)], [(1100, 1, 3), (3, 2, 0)]),
    *([(250, 7, 0), (0, 1, 9), (60, 20, 1)], [(2047, 2, 0)]),
)


def given_passes() -> list[Case]:
    made = []
    for i, places in enumerate(PLACES):
        for j, dtypes in enumerate(DTYPES):
            heads, head = HEADS[(i + j) % len(HEADS)], SIZES[(2 * i + j) % len(SIZES)]
            made.append(case(places, heads, head, dtypes, rotates=(i + j) % 3 > 0, seed=i))
    return made


def run(command: list[str], passes: list[Case]) -> list[str]:
    """Check each pass by each path; return the names of these."""
    content = b"".join(map(serialised, passes))
    done = subprocess.run(command, input=content, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    line, _, rest = done.stdout.partition(b"\n")
    paths, at = line.decode().split(","), 0
    for before in passes:
        for _ in paths:
            after = before.copy()
            arrays = [a for one in after.sequences for a in (one.keys, one.values)]
            attended = np.empty_like(before.rows.query)
            for array in (attended, *arrays):
                array[...] = np.frombuffer(rest, array.dtype, array.size, at).reshape(array.shape)
                at += array.nbytes
            check(attended, after, before)
    assert at == len(rest)
    return paths


def serialised(given: Case) -> bytes:
    rows = given.rows
    dtypes = rows.query.dtype, given.sequences[0].keys.dtype
    sizes = [*(KINDS[str(dtype)] for dtype in dtypes), rows.cos is not None]
    sizes += [rows.query.shape[1], *rows.key.shape[1:], len(given.sequences)]
    for one in given.sequences:
        sizes += [one.rows, one.cached, one.keys.shape[1]]
    arrays = [rows.query, rows.key, rows.value, rows.cos, rows.sin]
    arrays += [rows.key_scales, rows.value_scales]
    arrays += [array for one in given.sequences for array in (one.keys, one.values)]
    parts = [np.array(sizes, np.int64), *(one for one in arrays if one is not None)]
    return b"".join(part.tobytes() for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"), [("Haswell", ["AVX2", "plain"]), ("Nehalem", ["plain"])]
)
def test_on_other_x86(model: str, wanted: list[str], tmp_path: Path) -> None:
    assert run(on_x86(model, RUNNER, "attention", tmp_path), given_passes()) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("model", ["neoverse-n1", "cortex-a53"])
def test_on_aarch64(model: str, tmp_path: Path) -> None:
    command = on_aarch64(model, RUNNER, "attention", tmp_path)
    assert run(command, given_passes()) == ["NEON", "plain"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    return compiled("g++", RUNNER, "attention", folder, *SANITIZED)


@pytest.mark.slow(seconds=20)
def test_nothing_outside_is_read_or_written(sanitized: Path) -> None:
    assert run([str(sanitized)], given_passes())[-1] == "plain"


@pytest.mark.slow
@pytest.mark.parametrize("short", ["query", "key", "value", "cos", "scales", "cache"])
def test_an_array_that_is_too_short_is_seen(short: str, sanitized: Path) -> None:
    """Else the test above would pass with anything."""
    given = case([(5, 3, 0)], (2, 1), 64, ("float32", "int8"))
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run([str(sanitized), short], [given])
