"""Registers, shared memory and spills of every CUDA kernel on every architecture, from ptxas.

`python -m internvl_edge.kernels.resources` writes them to RESOURCES.md with the hash of
the sources they were measured on; tests compare that hash and fail on a spill.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.kernels.build import (
    COMPILE_TIMEOUT_S,
    CUDA_FLAGS,
    CUDA_SOURCES,
    SOURCES,
    BuildError,
    machine_code,
    nvcc_command,
    source_hash,
    supported_architectures,
)

REPORT = SOURCES / "RESOURCES.md"

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture; shared memory without the dynamic part."""

    kernel: str
    architecture: int
    registers: int
    shared_bytes: int
    spill_bytes: int


def parse_ptxas(log: str) -> list[Usage]:
    """Usage of every kernel in the output of `nvcc -Xptxas -v`."""
    usages = []
    kernel, architecture, spills = "", 0, 0
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernel, architecture, spills = entry[1], int(entry[2]), 0
        elif spill := _SPILLS.search(line):
            spills = int(spill[1]) + int(spill[2])
        elif kernel and (used := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            usages.append(
                Usage(kernel, architecture, int(used[1]), int(shared[1]) if shared else 0, spills)
            )
            kernel = ""
    return usages


def measure(architectures: Sequence[int] | None = None) -> list[Usage]:
    """Compile every kernel for each architecture with warnings as errors and collect its usage.

    Raises:
        BuildError: no nvcc, or it failed; a warning is a failure.
    """
    nvcc = nvcc_command()
    wanted = tuple(architectures or supported_architectures(nvcc))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_compile, nvcc, source, wanted, Path(folder)) for source in CUDA_SOURCES
        ]
        usages = [usage for job in jobs for usage in job.result()]
    return sorted(usages, key=lambda usage: (usage.kernel, usage.architecture))


def _compile(
    nvcc: list[str], source: str, architectures: Sequence[int], folder: Path
) -> list[Usage]:
    """One source with its launchers: host code is compiled too, so its warnings count."""
    output = folder / f"{source}.o"
    flags = [*CUDA_FLAGS, *machine_code(architectures), "-Xptxas", "-v"]
    done = subprocess.run(
        [*nvcc, *flags, "-c", str(SOURCES / source), "-o", str(output)],
        capture_output=True,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"{source} failed:\n{log.strip()}")
    return parse_ptxas(log)


def render(usages: Sequence[Usage], version: str) -> str:
    """RESOURCES.md: one row a kernel, one column an architecture."""
    architectures = sorted({usage.architecture for usage in usages})
    cells = {(usage.kernel, usage.architecture): usage for usage in usages}
    spilled = sum(usage.spill_bytes for usage in usages)
    head = [
        "# Resources of the CUDA kernels",
        "",
        "Written by `python -m internvl_edge.kernels.resources`; not edited by hand.",
        "Each cell is registers a thread / static shared memory in bytes / spilled bytes. The",
        "pixel shuffle also takes one token of dynamic shared memory: 25,600 bytes at fp16 and",
        "4C = 12,800.",
        "",
        f"- compiler: {version}",
        f"- sources: sha256 {source_hash()}",
        f"- spilled bytes in all: {spilled}",
        "",
        "| kernel | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |",
        "|---" * (len(architectures) + 1) + "|",
    ]
    return "\n".join([*head, *_rows(cells, architectures)]) + "\n"


def _rows(cells: dict[tuple[str, int], Usage], architectures: Sequence[int]) -> Iterator[str]:
    for kernel in sorted({kernel for kernel, _ in cells}):
        used = [cells[kernel, arch] for arch in architectures]
        columns = [f"{u.registers} / {u.shared_bytes} / {u.spill_bytes}" for u in used]
        yield f"| {kernel} | " + " | ".join(columns) + " |"


def write_resources() -> Path:
    """Measure every architecture and write RESOURCES.md beside the sources."""
    done = subprocess.run(
        [*nvcc_command(), "--version"], capture_output=True, text=True, check=False
    )
    version = next((line for line in done.stdout.splitlines() if "release" in line), "nvcc")
    REPORT.write_text(render(measure(), version.strip()), encoding="utf-8")
    return REPORT


def main() -> int:
    """Write the report; returns the exit status."""
    try:
        print(write_resources())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
