"""A vision tower's operations on CPUs we do not have: the bits they give here; and under
AddressSanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from vision_cases import KINDS, drawn, integer_case

from internvl_edge.kernels import build
from internvl_edge.kernels.vision.library import Rounding, VisionLibrary

RUNNER = Path(__file__).with_name("vision_runner.cpp")
FLAGS = [flag for flag in build.CPU_FLAGS if flag not in ("-shared", "-fPIC")]
ARM = "aarch64-linux-gnu-g++"
NORM, GELU, MULTIPLY, ATTEND, INTEGERS = range(5)
SCALE, EPSILON, INTEGER_SCALE = 0.05, 1e-6, 0.03


@dataclass(frozen=True)
class Call:
    """One operation as the runner reads it: its numbers, and arrays that may be absent."""

    numbers: tuple[int, ...]
    arrays: tuple[NDArray[np.float32] | None, ...]
    rounds: bool

    def content(self) -> bytes:
        given = [array.tobytes() for array in self.arrays if array is not None]
        return np.array(self.numbers, np.int64).tobytes() + b"".join(given)

    def here(self, library: VisionLibrary, path: str) -> NDArray[Any]:
        """Return what this machine's library gives."""
        operation, *n = self.numbers
        x, second, third, fourth, fifth, *factors = self.arrays
        if operation == ATTEND:
            assert second is not None
            shape = n[0], n[1], n[2] * n[3]
            q, k, v = (a.reshape(shape) for a in (x, second, third) if a is not None)
            norms = None if fourth is None or fifth is None else (fourth, fifth, EPSILON)
            how = self.how(factors[0])
            return library.attend(q, k, v, heads=n[2], norms=norms, rounding=how, path=path)
        assert x is not None
        if operation == NORM:
            assert third is not None
            return library.norm(
                *(x, third, fourth),
                **{"epsilon": EPSILON, "centred": bool(n[4]), "added": second},
                **{"rounding": self.how(fifth), "path": path},
            )[0]
        if operation == INTEGERS:
            assert second is not None
            rows, inputs, columns, _, zero, *_ = n
            return library.multiply_integers(
                x.view(np.uint8).ravel()[: rows * inputs].reshape(rows, inputs),
                second.view(np.int8).ravel()[: columns * inputs].reshape(columns, inputs),
                *(third, None if fourth is None else fourth.view(np.int32)),
                **{"scale": INTEGER_SCALE, "zero": zero, "gelu": self.how(fifth), "path": path},
            )
        if operation == GELU:
            return library.gelu(x, rounding=self.how(fifth), path=path)
        assert third is not None
        return library.multiply(x, third, fourth, path=path)

    def how(self, factors: NDArray[np.float32] | None) -> Rounding | None:
        return Rounding(SCALE, 128, factors) if self.rounds else None


def factors(columns: int, given: bool) -> NDArray[np.float32] | None:
    return drawn((columns,), "random", columns) if given else None


def norms() -> Iterator[Call]:
    for i, (rows, width) in enumerate(((1, 1), (2, 15), (3, 16), (5, 33), (2, 300), (4, 1024))):
        added, centred, biased, rounds = i % 2, i % 3 > 0, i % 3 > 1, i % 4 > 1
        arrays = (
            drawn((rows, width), KINDS[i % len(KINDS)], i),
            drawn((rows, width), "random", i + 1) if added else None,
            drawn((width,), "random", i + 2),
            drawn((width,), "random", i + 3) if biased else None,
            factors(width, rounds),
        )
        yield Call((NORM, rows, width, 0, added, centred, biased, rounds), arrays, rounds)


def gelus() -> Iterator[Call]:
    for i, (rows, width) in enumerate(((1, 1), (3, 37), (2, 640))):
        arrays = (drawn((rows, width), "random", i) * 3, *[None] * 3, factors(width, i == 1))
        yield Call((GELU, rows, width, 0, 0, 0, 0, i == 1), arrays, i == 1)


def products() -> Iterator[Call]:
    for i, (rows, inputs, columns) in enumerate(((1, 1, 1), (13, 588, 35), (25, 30, 70))):
        arrays = (
            drawn((rows, inputs), "random", i),
            None,
            drawn((columns, inputs), "random", i + 1),
            drawn((columns,), "random", i + 2) if i else None,
            None,
        )
        yield Call((MULTIPLY, rows, inputs, columns, 0, 0, i > 0, 0), arrays, False)


def attentions() -> Iterator[Call]:
    shapes = ((1, 1, 1, 1), (1, 31, 2, 7), (2, 33, 3, 16), (1, 97, 1, 25), (1, 300, 2, 32))
    for i, (tiles, tokens, heads, size) in enumerate(shapes):
        width, normed, rounds = heads * size, i % 2, i % 3 == 1
        arrays = (
            *(drawn((tiles * tokens, width), KINDS[i % 3], i + part) for part in range(3)),
            *(drawn((width,), "random", i + part) if normed else None for part in range(2)),
            factors(width, rounds),
        )
        yield Call((ATTEND, tiles, tokens, heads, size, 0, normed, rounds), arrays, rounds)


def in_floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return bytes as the runner reads them: in floats, filled up with zeros."""
    content = values.tobytes()
    return np.frombuffer(content + bytes(-len(content) % 4), np.float32)


def integers() -> Iterator[Call]:
    shapes = ((1, 1, 1), (13, 588, 35), (25, 30, 70), (7, 2053, 33), (12, 1025, 32), (2, 3, 16))
    for i, (rows, inputs, columns) in enumerate(shapes):
        case, rounds = integer_case(rows, inputs, columns, ("ends", "random")[i % 2], i), i % 2 == 1
        arrays = (
            *(in_floats(case.x), in_floats(case.weight), case.scales),
            None if case.bias is None else in_floats(case.bias),
            factors(columns, rounds),
        )
        biased = case.bias is not None
        numbers = (INTEGERS, rows, inputs, columns, 0, case.zero, biased, rounds)
        yield Call(numbers, arrays, rounds)


def all_calls() -> list[Call]:
    return [*norms(), *gelus(), *products(), *attentions(), *integers()]


def compiled(compiler: str, folder: Path, *flags: str) -> Path:
    """Return the runner, built statically unless flags say otherwise."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program, include = folder / "runner", f"-I{build.SOURCES / 'vision'}"
    command = [compiler, *FLAGS, include, *(flags or ("-static",)), str(RUNNER)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{compiler} cannot build it here: {done.stderr.strip()[-300:]}")
    return program


def emulator(name: str) -> str:
    if (found := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed (Debian: qemu-user-static)")
    return found


def run(command: list[str], calls: list[Call]) -> tuple[list[str], bytes]:
    """Return the names of the paths, and the results of each of every call."""
    content = b"".join(call.content() for call in calls)
    done = subprocess.run(command, input=content, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    line, _, rest = done.stdout.partition(b"\n")
    return line.decode().split(","), rest


def check(command: list[str], wanted: list[str]) -> None:
    """Check that every path gives what this machine's fastest gives, bit for bit."""
    try:
        library = VisionLibrary(build.operator_library())
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")
    calls = all_calls()
    paths, got = run(command, calls)
    assert paths == wanted
    at = 0
    for call in calls:
        here = call.here(library, library.paths[0]).tobytes()
        for path in paths:
            assert got[at : at + len(here)] == here, (path, call.numbers)
            at += len(here)
    assert at == len(got)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"), [("Haswell", ["AVX2", "SSE2", "plain"]), ("Nehalem", ["SSE2", "plain"])]
)
def test_on_other_x86(model: str, wanted: list[str], tmp_path: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("this machine is no x86-64")
    program = compiled("g++", tmp_path)
    check([emulator("qemu-x86_64-static"), "-cpu", model, str(program)], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "products"),
    [
        ("neoverse-n1", ["NEON dot products"]),
        ("max", ["NEON matrix products", "NEON dot products"]),
        ("cortex-a53", []),
    ],
)
def test_on_aarch64(model: str, products: list[str], tmp_path: Path) -> None:
    program = compiled(ARM, tmp_path)
    wanted = [*products, "NEON", "plain"]
    check([emulator("qemu-aarch64-static"), "-cpu", model, str(program)], wanted)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    return compiled("g++", tmp_path_factory.mktemp("sanitized"), *flags)


@pytest.mark.slow
def test_nothing_outside_is_read_or_written(sanitized: Path) -> None:
    try:
        paths = VisionLibrary(build.operator_library()).paths
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")
    check([str(sanitized)], paths)


@pytest.mark.slow
@pytest.mark.parametrize("operation", range(5))
def test_an_array_that_is_too_short_is_seen(operation: int, sanitized: Path) -> None:
    """Else the test above would pass with anything."""
    call = [one for one in all_calls() if one.numbers[0] == operation][1]
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run([str(sanitized), "short"], [call])
