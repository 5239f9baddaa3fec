"""Builds the kernels on first use: the CPU library by g++ or clang++, the CUDA fat binary by nvcc.

Products go to `$XDG_CACHE_HOME/internvl-edge/kernels/<hash>/` (default `~/.cache`). The hash covers
sources, compiler version, flags, the variables that compilers read, the C library and the CPU's
features, so a product is never stale; a file lock lets one process build while others wait, and a
rename publishes it whole. Only the library of operators may be put into the package, to be
distributed: it chooses among the CPU's instructions when it runs.

    python -m internvl_edge.kernels.build               # the CPU libraries; prints their paths
    python -m internvl_edge.kernels.build --cuda        # the fat binaries
    python -m internvl_edge.kernels.build --ship        # the operators, into the package
    python -m internvl_edge.kernels.resources   # registers and spills -> RESOURCES.md
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from internvl_edge.kernels.cpu import is_emulated

SOURCES = Path(__file__).parent
CPU_SOURCE = "host.cpp"
CUDA_SOURCES = ("tiling.cu", "pixel_shuffle.cu", "select.cu")
#: Folders with the sources of the operators: what they share, and each kernel.
OPERATOR_FOLDERS = ("operators", "attention", "blocks", "vision")

#: Jetson Orin is 87, Thor 110; a PTX of the newest lets later devices compile their own.
CUDA_ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)

# -ffp-contract=off: a fused multiply-add where none is written would change bits.
CPU_FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp-simd"),
    *("-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"),
)
# 512-bit vectors where there are any: 0.08 ns an output byte of the vertical pass against 0.15.
NATIVE_FLAGS = {
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
}
CUDA_FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings")

COMPILE_TIMEOUT_S = 600

_log = logging.getLogger("internvl_edge")

#: Variables by which GCC, Clang and nvcc find headers, libraries and parts of themselves, or take
#: further options.
COMPILER_VARIABLES = (
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH"),
    *("GCC_EXEC_PREFIX", "CCC_OVERRIDE_OPTIONS", "SDKROOT", "SOURCE_DATE_EPOCH"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
)


class BuildError(Exception):
    """No compiler, or it failed; the message says which and how."""


def cpu_library(extra_flags: Sequence[str] = ()) -> Path:
    """The CPU library, built now if the cache has none.

    Args:
        extra_flags: added at the end of the command line (sanitizers, warnings as errors).

    Raises:
        BuildError: no C++ compiler (`CXX`, g++, clang++, c++), it failed, or no writable cache.
    """
    compiler = _cpu_compiler()
    # Under an emulator a compiler sees the host's CPU: what it makes for that is illegal here.
    flags = () if is_emulated() else NATIVE_FLAGS.get(platform.machine(), ())
    native = (*flags, *extra_flags)
    try:
        return _cpu_library(compiler, native)
    except BuildError:
        if native == tuple(extra_flags):
            raise
        return _cpu_library(compiler, tuple(extra_flags))  # a compiler that does not know this CPU


def operator_library(extra_flags: Sequence[str] = ()) -> Path:
    """Return the library of operators: the distribution's, or one built now if the cache has none.

    Args:
        extra_flags: added at the end of the command line; what is shipped is not taken then.

    Raises:
        BuildError: see `cpu_library`.
    """
    shipped = shipped_library()
    if shipped.exists() and not extra_flags:
        return shipped
    compiler = _cpu_compiler()
    units = [path for folder in operator_folders() for path in sorted(folder.glob("*.cpp"))]
    command = [*compiler, *CPU_FLAGS, "-fvisibility=hidden", *extra_flags, *map(str, units)]
    name, version = "libinternvl_edge_operators.so", _version(compiler)
    return _cached(command, version, name, cpu=platform.machine(), sources=operator_hash())


def operator_folders() -> list[Path]:
    """Return the folders whose sources make the library of operators."""
    return [SOURCES / name for name in OPERATOR_FOLDERS]


def shipped_library() -> Path:
    """Return where a distribution has the operators of these sources, be they there or not."""
    kind = f"{platform.system()}-{platform.machine()}-{operator_hash()[:16]}".lower()
    return operator_folders()[0] / f"libinternvl_edge_operators-{kind}.so"


def ship() -> Path:
    """Put the library of operators into the package, for machines of this kind without a compiler.

    Raises:
        BuildError: see `cpu_library`; or the package cannot be written to.
    """
    built, shipped = operator_library(), shipped_library()
    if built == shipped:
        return shipped
    partial = shipped.with_suffix(".partial")
    try:
        shutil.copyfile(built, partial)
        partial.replace(shipped)
        for other in shipped.parent.glob("*.so"):
            if other != shipped:
                other.unlink()
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BuildError(f"cannot write {shipped}: {error.strerror or error}") from error
    return shipped


def cuda_binary(source: str) -> Path:
    """The fat binary of one of CUDA_SOURCES for every architecture this nvcc knows, and PTX.

    Raises:
        BuildError: no nvcc (`NVCC`, PATH, /usr/local/cuda), it failed, or no writable cache.
    """
    nvcc = nvcc_command()
    flags = (*CUDA_FLAGS, *gencode(supported_architectures(nvcc)), "-fatbin")
    command = [*nvcc, *flags, str(SOURCES / source)]
    return _cached(command, _version(nvcc), f"{Path(source).stem}.fatbin", cpu="")


def _cpu_library(compiler: list[str], flags: Sequence[str]) -> Path:
    command = [*compiler, *CPU_FLAGS, *flags, str(SOURCES / CPU_SOURCE)]
    return _cached(command, _version(compiler), "libinternvl_edge_cpu.so", cpu=cpu_identity())


def _cpu_compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if not shutil.which(command[0]):
            raise BuildError(f"CXX names {command[0]!r:.200}, which is not found")
        return command
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found (CXX, g++, clang++, c++)")


def nvcc_command() -> list[str]:
    """The command that starts nvcc; `NVCC` overrides it."""
    if chosen := os.environ.get("NVCC"):
        command = shlex.split(chosen)
        if not shutil.which(command[0]):
            raise BuildError(f"NVCC names {command[0]!r:.200}, which is not found")
        return command
    for candidate in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        if path := shutil.which(candidate):
            return [path]
    raise BuildError("no nvcc found (NVCC, PATH, /usr/local/cuda/bin); install the CUDA toolkit")


def supported_architectures(nvcc: Sequence[str]) -> tuple[int, ...]:
    """Those of CUDA_ARCHITECTURES this nvcc can compile for; CUDA 12 knows no sm_110."""
    listed = _output([*nvcc, "--list-gpu-code"]).split()
    known = tuple(arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed)
    if not known:
        raise BuildError(f"{nvcc[0]} compiles for none of {CUDA_ARCHITECTURES}")
    return known


def gencode(architectures: Sequence[int]) -> list[str]:
    """nvcc's flags for machine code of each architecture and PTX of the last."""
    last = architectures[-1]
    return [*machine_code(architectures), f"-gencode=arch=compute_{last},code=compute_{last}"]


def machine_code(architectures: Sequence[int]) -> list[str]:
    """nvcc's flags for machine code of each architecture."""
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]


def source_hash(folder: Path = SOURCES) -> str:
    """sha256 over names and contents of every C++ and CUDA source in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def operator_hash() -> str:
    """sha256 over the sources of the operators, and in which folder each is."""
    parts = [f"{folder.name} {source_hash(folder)}" for folder in operator_folders()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cpu_identity() -> str:
    """Return what -march=native depends on: the model and features that /proc/cpuinfo names."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "CPU variant")
    lines = [platform.machine()]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{lines[0]} {platform.processor()}"
    for line in dict.fromkeys(text.splitlines()):  # big.LITTLE: every kind of core counts
        if line.partition(":")[0].strip() in wanted:
            lines.append(line)
    return "\n".join(lines)


def user_cache() -> Path:
    """Return the user's folder of what can be made again, whether or not it exists yet.

    A user without a home, as containers have them, gets a place where nothing can be written.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "internvl-edge"
    try:
        return Path.home() / ".cache" / "internvl-edge"
    except RuntimeError:
        return Path(os.devnull) / "internvl-edge"


def cache_directory() -> Path:
    """Return the folder of products, whether or not it exists yet."""
    return user_cache() / "kernels"


def _cached(
    command: list[str], version: str, name: str, *, cpu: str, sources: str | None = None
) -> Path:
    """The product of `command -o <name>`, from the cache or made now."""
    flags = [part for part in command if not part.startswith(str(SOURCES))]
    sources = sources or source_hash(SOURCES)
    key = "\0".join([sources, *flags, version, cpu, name, *_surroundings()])
    folder = cache_directory() / hashlib.sha256(key.encode()).hexdigest()[:24]
    product = folder / name
    if product.exists():
        return product
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not product.exists():
                _compile(command, product)
    except OSError as error:
        raise BuildError(
            f"cannot write the kernel cache {folder}: {error.strerror or error};"
            " set XDG_CACHE_HOME to a writable directory"
        ) from error
    return product


def _surroundings() -> list[str]:
    """What a product depends on beside sources and command: variables that compilers read, and the
    C library, where several machines share one cache."""
    told = [f"{name}={os.environ[name]}" for name in COMPILER_VARIABLES if name in os.environ]
    return [*told, *platform.libc_ver()]


def _compile(command: list[str], product: Path) -> None:
    """Compile beside the product and rename: others see all of it or nothing."""
    _log.info("compiling %s for this machine, once", product.name)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=product.parent)
    os.close(handle)
    try:
        _output([*command, "-o", partial])
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(partial, product)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _version(command: Sequence[str]) -> str:
    return _output([*command, "--version"])


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}:\n{reason}")
    return done.stdout + done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl_edge.kernels.build", description="build the kernels"
    )
    parser.add_argument("--cuda", action="store_true", help="the CUDA fat binaries")
    parser.add_argument("--ship", action="store_true", help="the operators, into the package")
    arguments = parser.parse_args(argv)
    try:
        if arguments.cuda:
            for source in CUDA_SOURCES:
                print(cuda_binary(source))
        elif arguments.ship:
            print(ship())
        else:
            print(cpu_library(), operator_library(), sep="\n")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
