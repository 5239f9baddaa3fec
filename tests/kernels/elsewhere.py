"""Programs of kernels built for CPUs we do not have, and what runs them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from internvl_edge.kernels import build

FLAGS = [flag for flag in build.CPU_FLAGS if flag not in ("-shared", "-fPIC")]
ARM = "aarch64-linux-gnu-g++"
#: Where Debian has the shared libraries of that compiler's programs.
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"
#: What finds accesses outside of arrays.
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def compiled(compiler: str, runner: Path, sources: str, folder: Path, *flags: str) -> Path:
    """Build a runner with a kernel's folder of sources, statically unless flags say otherwise."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = folder / "runner"
    include = f"-I{build.SOURCES / sources}"
    command = [compiler, *FLAGS, include, *(flags or ("-static",)), str(runner)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{compiler} cannot build it here: {done.stderr.strip()[-300:]}")
    return program


def on_x86(model: str, runner: Path, sources: str, folder: Path) -> list[str]:
    """Build a runner, and return the command that runs it as on a CPU of another model."""
    if platform.machine() != "x86_64":
        pytest.skip("this machine is no x86-64")
    program = compiled("g++", runner, sources, folder)
    return [emulator("qemu-x86_64-static"), "-cpu", model, str(program)]


def on_aarch64(model: str, runner: Path, sources: str, folder: Path) -> list[str]:
    """Build a runner, and return the command that runs it as on a CPU of that model."""
    program = compiled(ARM, runner, sources, folder)
    return [emulator("qemu-aarch64-static"), "-cpu", model, str(program)]


def emulator(name: str) -> str:
    if (found := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed (Debian: qemu-user-static)")
    return found
