"""Products of weights in blocks on CPUs we do not have, by emulation; and memory's bounds."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from block_cases import BITS, EXACT_INPUTS, KINDS, Case, case, check, error, integers
from elsewhere import (
    ARM,
    ARM_LIBRARIES,
    SANITIZED,
    compiled,
    emulator,
    on_aarch64,
    on_x86,
)

from internvl_edge.kernels.blocks.library import BLOCKS

RUNNER = Path(__file__).with_name("block_runner.cpp")

#: Of awkward rows, inputs and columns, on both sides of tiles and spans.
SHAPES = (
    *((1, 1, 1), (2, 31, 7), (2, 60, 70), (3, 2100, 40), (4, 330, 37), (5, 33, 15)),
    *((6, 96, 16), (7, 500, 17), (11, 257, 20), (12, 1024, 31), (13, 1030, 33)),
    *((25, 640, 65), (50, 130, 129)),
)


def given_products() -> list[Case]:
    """Products with results in integers, and with any."""
    made = []
    for i, (rows, inputs, columns) in enumerate(SHAPES):
        for block, bits in itertools.product(BLOCKS, BITS):
            made.append(case(rows, inputs, columns, block, KINDS[i % len(KINDS)], i, bits))
    whole = [one for one in made if one.x.shape[1] + one.block <= EXACT_INPUTS[one.bits]]
    return [integers(one)[0] for one in whole] + made


def run(command: list[str], products: list[Case]) -> tuple[list[str], list[list[np.ndarray]]]:
    """Return the names of the paths, and of each product the result of each path."""
    content = b"".join(
        np.array(
            [len(p.x), p.x.shape[1], len(p.values), p.block, p.bits, p.bias is not None], np.int64
        ).tobytes()
        + p.x.tobytes()
        + p.values.tobytes()
        + p.scales.tobytes()
        + (b"" if p.bias is None else p.bias.tobytes())
        for p in products
    )
    done = subprocess.run(command, input=content, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    line, _, rest = done.stdout.partition(b"\n")
    paths, floats, at, results = line.decode().split(","), np.frombuffer(rest, np.float32), 0, []
    for p in products:
        size = len(p.x) * len(p.values)
        each = floats[at : at + size * len(paths)].reshape(len(paths), len(p.x), len(p.values))
        results.append(list(each))
        at += size * len(paths)
    assert at == len(floats)
    return paths, results


def check_all(products: list[Case], results: list[list[np.ndarray]]) -> None:
    for given, each in zip(products, results, strict=True):
        check(each, given)
        if (given.scales == 1).all():  # integers
            assert max(error(y, given) for y in each) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"), [("Haswell", ["AVX2", "plain"]), ("Nehalem", ["plain"])]
)
def test_on_other_x86(model: str, wanted: list[str], tmp_path: Path) -> None:
    products = given_products()
    paths, results = run(on_x86(model, RUNNER, "blocks", tmp_path), products)
    assert paths == wanted
    check_all(products, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("max", ["NEON matrix products", "NEON dot products", "plain"]),
        ("neoverse-n1", ["NEON dot products", "plain"]),
        ("cortex-a53", ["plain"]),
    ],
)
def test_on_aarch64(model: str, wanted: list[str], tmp_path: Path) -> None:
    products = given_products()
    paths, results = run(on_aarch64(model, RUNNER, "blocks", tmp_path), products)
    assert paths == wanted
    check_all(products, results)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    return compiled("g++", RUNNER, "blocks", folder, *SANITIZED)


@pytest.mark.slow(seconds=20)
def test_nothing_outside_is_read_or_written(sanitized: Path) -> None:
    products = given_products()
    paths, results = run([str(sanitized)], products)
    assert paths[-1] == "plain"
    check_all(products, results)


@pytest.mark.slow(seconds=20)
def test_nothing_outside_is_read_or_written_on_aarch64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiled(ARM, RUNNER, "blocks", tmp_path, *SANITIZED)
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # that needs ptrace, which QEMU lacks
    command = [emulator("qemu-aarch64-static"), "-cpu", "max", "-L", ARM_LIBRARIES, str(program)]
    products = given_products()
    paths, results = run(command, products)
    assert "NEON matrix products" in paths
    check_all(products, results)
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run([*command, "values"], [case(9, 64, 20, 32)])


@pytest.mark.slow
@pytest.mark.parametrize("short", ["x", "values", "scales"])
def test_an_array_that_is_too_short_is_seen(short: str, sanitized: Path) -> None:
    """Else the test above would pass with anything."""
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run([str(sanitized), short], [case(3, 64, 20, 32)])
