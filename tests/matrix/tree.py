"""The packages as an emulated machine finds them, with the operators built for its kind of CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from internvl_edge.kernels import build
from matrix.arm64 import Skipped, call

ROOMS = Path(__file__).parents[2]
PACKAGES = ("bench", "bundle", "calib_data", "cli", "examples", "export", "kernels", "runtime")
#: The compiler for a machine that is not at hand (Debian: g++-aarch64-linux-gnu).
CROSS = "aarch64-linux-gnu-g++"
COMPILE_S = 300


def make_tree(folder: Path) -> None:
    """Write a folder of the packages; that of the kernels holds the operators, as distributed."""
    packages = folder / "internvl_edge"
    shutil.rmtree(packages, ignore_errors=True)
    packages.mkdir(parents=True)
    for room in PACKAGES:
        (packages / room).symlink_to(ROOMS / room)
    (packages / "kernels").unlink()
    kernels = packages / "kernels"
    shutil.copytree(ROOMS / "kernels", kernels, ignore=shutil.ignore_patterns("*.so"))
    _ship(kernels, kernels / "operators")


def _ship(sources: Path, folder: Path) -> None:
    """Put the operators into a package, for this machine and for aarch64; say what cannot be."""
    name = build.shipped_library().name
    try:
        shutil.copy(build.operator_library(), folder / name)
    except build.BuildError as error:
        print(f"no operators of ours for this machine: {error}", flush=True)
    try:
        if shutil.which(CROSS) is None:
            raise Skipped(f"{CROSS} is not installed")
        units = [
            str(path)
            for one in build.OPERATOR_FOLDERS
            for path in sorted((sources / one).glob("*.cpp"))
        ]
        flags = [*build.CPU_FLAGS, "-fvisibility=hidden"]
        library = folder / name.replace(build.platform.machine(), "aarch64")
        call([CROSS, *flags, *units, "-o", str(library)], COMPILE_S)
    except Skipped as error:
        print(f"no operators of ours for aarch64: {error}", flush=True)
