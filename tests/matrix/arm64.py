"""An aarch64 root with Python and the runtime's packages: downloaded, nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: The newest that the emulator runs: 1.31 and 1.32 crash at import under qemu 7.2. It is also what
#: JetPack 6's Python 3.10 gets.
ONNXRUNTIME = "onnxruntime==1.23.2"
VERSION = "3.11"
DEBIAN = (
    f"python{VERSION}-minimal libpython{VERSION}-minimal libpython{VERSION}-stdlib libc6 libstdc++6"
    " libgcc-s1 libgomp1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1"
).split()
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
PACKAGES = ("numpy", "pillow", "sentencepiece", ONNXRUNTIME)


class Skipped(Exception):
    """A kind that cannot be run here, and why."""


@dataclass(frozen=True)
class Root:
    """Where an emulated system lies."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "root" / "usr" / "bin" / f"python{VERSION}"

    def variables(self, tree: Path) -> dict[str, str]:
        """Return the environment in which its Python finds its own files and `tree`."""
        site = self.folder / "site"
        return {
            "QEMU_LD_PREFIX": str(self.folder / "root"),
            "PYTHONHOME": str(self.folder / "root" / "usr"),
            "PYTHONPATH": f"{tree}{os.pathsep}{site}",
        }


def make_root(folder: Path, seconds_left: Callable[[], float]) -> Root:
    """Download an aarch64 Python, its libraries and wheels, unless they are there.

    Args:
        folder: made anew.
        seconds_left: how long the next step may take.

    Raises:
        Skipped: they cannot be had here.
    """
    root, done = Root(folder), folder / "done"
    wanted = " ".join([*DEBIAN, *PACKAGES])
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return root
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Skipped("no apt-get and dpkg to make an aarch64 root with")
    shutil.rmtree(folder, ignore_errors=True)
    _download_debian(folder, seconds_left)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    chosen = ["--target", str(folder / "site"), "--python-version", VERSION, *platforms]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:"]
    call([*pip, *chosen, *PACKAGES], seconds_left())
    done.write_text(wanted, encoding="utf-8")
    return root


def _download_debian(folder: Path, seconds_left: Callable[[], float]) -> None:
    """Unpack Debian's packages under `root`, with package lists of their own."""
    for part in ("lists/partial", "cache/archives/partial", "debs", "root"):
        (folder / part).mkdir(parents=True)
    options = [
        f"-o{key}={value}"
        for key, value in {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": folder / "cache",
        }.items()
    ]
    call(["apt-get", "-q", *options, "update"], seconds_left())
    call(["apt-get", "-q", *options, "download", *DEBIAN], seconds_left(), folder / "debs")
    for package in (folder / "debs").glob("*.deb"):
        call(["dpkg", "-x", str(package), str(folder / "root")], seconds_left())


def call(command: list[str], seconds: float, where: Path | None = None) -> None:
    """Run a command.

    Raises:
        Skipped: it failed, or took longer than `seconds`.
    """
    try:
        done = subprocess.run(
            command, cwd=where, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"{' '.join(command[:2])} took over {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Skipped(f"{' '.join(command[:2])} failed: {said[:200]}")
