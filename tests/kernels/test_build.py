"""Building: the cache, its lock, no compiler, other instruction sets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from internvl_edge.kernels import build, ops

pytestmark = pytest.mark.slow(seconds=1)

#: Stands in for a compiler: notes each run, takes a moment, and writes its arguments to `-o`.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "stub $STUB_VERSION"; exit 0; fi
echo run >> "$STUB_LOG"
for last; do :; done
case "$* $STUB_REFUSES" in *"$STUB_REFUSES"*"$STUB_REFUSES") echo "refused" >&2; exit 1;; esac
sleep 0.2
echo "$*" > "$last"
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub compiler in an empty cache; returns the log of its runs."""
    compiler, log = tmp_path / "stub", tmp_path / "log"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    log.touch()
    for name, value in (
        ("CXX", str(compiler)),
        ("XDG_CACHE_HOME", str(tmp_path / "cache")),
        ("STUB_LOG", str(log)),
        ("STUB_VERSION", "1"),
        ("STUB_REFUSES", "nothing of this name"),
    ):
        monkeypatch.setenv(name, value)
    return log


def runs(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_a_product_is_built_once_and_not_into_the_package(stub: Path) -> None:
    before = sorted(path.name for path in build.SOURCES.iterdir())
    first = build.cpu_library()
    assert build.cpu_library() == first
    assert first.is_relative_to(build.cache_directory())
    assert runs(stub) == 1
    assert sorted(path.name for path in build.SOURCES.iterdir()) == before
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, "lock"]


def test_many_at_once_build_once(stub: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        products = list(pool.map(lambda _: build.cpu_library(), range(8)))
    assert len(set(products)) == 1
    assert runs(stub) == 1


def test_processes_wait_for_each_other(stub: Path) -> None:
    script = "from internvl_edge.kernels import build; print(build.cpu_library())"
    command = [sys.executable, "-c", script]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    products = {process.communicate(timeout=60)[0] for process in started}
    assert len(products) == 1
    assert runs(stub) == 1


def test_another_version_flag_or_cpu_is_another_product(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = {build.cpu_library(), build.cpu_library(("-g",))}
    monkeypatch.setenv("STUB_VERSION", "2")
    products.add(build.cpu_library())
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    products.add(build.cpu_library())
    monkeypatch.setattr(build, "source_hash", lambda folder: "another source")
    products.add(build.cpu_library())
    assert len(products) == runs(stub) == 5


def test_a_variable_that_compilers_read_makes_another_product(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in build.COMPILER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    products = {build.cpu_library()}
    for name in build.COMPILER_VARIABLES:
        with monkeypatch.context() as one:
            one.setenv(name, "something")
            products.add(build.cpu_library())
    assert len(products) == runs(stub) == 1 + len(build.COMPILER_VARIABLES)


def test_another_c_library_makes_another_product(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that share a home directory."""
    products = {build.cpu_library()}
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "2.17"))
    products.add(build.cpu_library())
    assert len(products) == runs(stub) == 2


def test_a_compiler_that_does_not_know_this_cpu(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.NATIVE_FLAGS, build.platform.machine(), ("-march=native",))
    monkeypatch.setenv("STUB_REFUSES", "-march=native")
    assert "native" not in build.cpu_library().read_text()
    assert runs(stub) == 2


def test_a_compiler_is_not_asked_for_the_host_of_an_emulator(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.NATIVE_FLAGS, build.platform.machine(), ("-march=native",))
    products = {build.cpu_library()}
    monkeypatch.setattr(build, "is_emulated", lambda: True)
    products.add(build.cpu_library())
    assert ["native" in product.read_text() for product in products].count(False) == 1
    assert runs(stub) == 2


def test_a_failing_compiler_leaves_nothing(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_REFUSES", "-std=c++17")
    with pytest.raises(build.BuildError, match=r"failed with status 1:\nrefused"):
        build.cpu_library()
    left = {path.name for path in build.cache_directory().rglob("*") if path.is_file()}
    assert left == {"lock"}


def test_a_cache_that_cannot_be_written(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set XDG_CACHE_HOME"):
        build.cpu_library()


def test_a_user_without_a_home(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them, where the id of a user is any number."""

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    with pytest.raises(build.BuildError, match="Not a directory; set XDG_CACHE_HOME"):
        build.cpu_library()


@pytest.mark.parametrize("finder", [build.nvcc_command, build.cpu_library])
def test_a_named_compiler_must_exist(
    finder: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("NVCC", str(tmp_path / "none"))
    assert callable(finder)
    with pytest.raises(build.BuildError, match="which is not found"):
        finder()


FALLBACK = """
import numpy as np
from internvl_edge.kernels import ops
from internvl_edge.runtime.images.preprocess import tile_image
from PIL import Image
pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
tiles = ops.tile(pixels, columns=2, rows=3, tile_size=28)
assert (tile_image(Image.fromarray(pixels), tile_size=28, max_tiles=6) is not None)
print(tiles.tobytes().hex())
"""


def test_without_a_compiler_one_line_and_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/nonexistent/c++", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = done.stderr.splitlines()
    assert "CPU kernels not built" in line
    assert "/nonexistent/c++" in line
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    assert done.stdout.strip() == ops.tile(pixels, columns=2, rows=3, tile_size=28).tobytes().hex()
    assert not list(tmp_path.iterdir())


def test_importing_the_runtime_builds_and_loads_nothing(tmp_path: Path) -> None:
    script = (
        "import internvl_edge.runtime, internvl_edge.runtime.images.preprocess, pathlib;"
        "from internvl_edge.kernels import ops;"
        "assert ops.cpu_kernels.cache_info().misses == 0;"
        "assert 'libinternvl_edge_cpu' not in pathlib.Path('/proc/self/maps').read_text()"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=120, check=True)
    assert not list(tmp_path.iterdir())


def test_kernels_need_the_standard_library_and_numpy_alone() -> None:
    script = (
        "import sys;from internvl_edge.kernels import build, cuda, ops, reference, resources;"
        "others = {'PIL', 'onnx', 'onnxruntime', 'torch', 'cuda', 'internvl_edge.runtime'};"
        "assert not others & set(sys.modules), others & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)


@pytest.mark.parametrize(
    "flags",
    [("-Werror", "-Wconversion", "-Wshadow"), ("-march=x86-64",), ("-march=haswell",)],
    ids=lambda flags: flags[0],
)
def test_other_instruction_sets_give_the_same_bits(flags: tuple[str, ...]) -> None:
    """SSE2 divides where others multiply and correct; the first case is this CPU's own build."""
    if ops.cpu_kernels() is None:
        pytest.skip("no C++ compiler here")
    if flags[0].startswith("-march") and build.platform.machine() != "x86_64":
        pytest.skip("an x86-64 flag")
    if flags == ("-march=haswell",) and "avx2" not in build.cpu_identity():
        pytest.skip("this CPU has no AVX2")
    path = build.cpu_library(flags)
    script = (
        "import sys, hashlib, numpy as np;from internvl_edge.kernels import ops\n"
        "library = ops.load(sys.argv[1]); ops.cpu_kernels = lambda: library\n"
        "rng = np.random.default_rng(3)\n"
        "pixels = rng.integers(0, 256, (211, 333, 3), dtype=np.uint8)\n"
        "grid = dict(columns=3, rows=2, tile_size=56)\n"
        "parts = [ops.tile(pixels, **grid)]\n"
        "parts += [ops.tile(pixels, layout=l, dtype=d, **grid)"
        " for l in ('nchw', 'patches') for d in ('float32', 'float16')]\n"
        "x = rng.standard_normal((2, 17, 24)).astype(np.float16)\n"
        "parts.append(ops.pixel_shuffle(x))\n"
        "print([hashlib.sha256(part.tobytes()).hexdigest() for part in parts])"
    )
    got, expected = (
        subprocess.check_output([sys.executable, "-c", script, str(library)], text=True)
        for library in (path, build.cpu_library())
    )
    assert got == expected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of its own that holds the operators' sources."""
    folders = [Path(shutil.copytree(one, tmp_path / one.name)) for one in build.operator_folders()]
    monkeypatch.setattr(build, "operator_folders", lambda: folders)
    return folders[0]


def test_the_operators_are_for_every_cpu_of_a_kind(
    stub: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = build.operator_library()
    assert "native" not in product.read_text()
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    assert build.operator_library() == product
    assert runs(stub) == 1
    assert build.operator_library(("-g",)) != product


def test_a_change_of_either_library_leaves_the_other(stub: Path, package: Path) -> None:
    tiling, operators = build.cpu_library(), build.operator_library()
    (package / "operator.h").write_text("another source")
    assert build.cpu_library() == tiling
    assert build.operator_library() != operators


def test_what_is_shipped_needs_no_compiler(
    stub: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = build.ship()
    assert shipped.parent == package
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build.operator_library() == shipped
    assert build.ship() == shipped


def test_the_command_builds_both_libraries_and_ships_one(
    stub: Path, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([]) == 0
    assert capsys.readouterr().out.split() == [
        str(build.cpu_library()),
        str(build.operator_library()),
    ]
    assert build.main(["--ship"]) == 0
    assert capsys.readouterr().out.split() == [str(build.shipped_library())]
    assert build.shipped_library().exists()


def test_what_was_shipped_with_other_sources_is_not_used(stub: Path, package: Path) -> None:
    older = build.ship()
    (package / "operator.h").write_text("another source")
    assert build.operator_library() != older
    newer = build.ship()
    assert build.operator_library() == newer
    assert list(package.glob("*.so")) == [newer]


def test_a_package_that_cannot_be_written(
    stub: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.shutil, "copyfile", full)
    with pytest.raises(build.BuildError, match=r"cannot write .*: No space left on device"):
        build.ship()
    assert not [path for path in package.iterdir() if path.suffix in (".so", ".partial")]
