"""CUDA kernels as nvcc builds them: for every target, without a spill."""

from __future__ import annotations

import re
import struct

import pytest

from internvl_edge.kernels import build, resources

PTXAS = """ptxas info    : Compiling entry function 'ive_a' for 'sm_87'
ptxas info    : Function properties for ive_a
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 32 bytes smem, 576 bytes cmem[0]
ptxas info    : Compiling entry function 'ive_b' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 576 bytes cmem[0]
"""


def test_ptxas_log_is_read() -> None:
    assert resources.parse_ptxas(PTXAS) == [
        resources.Usage("ive_a", 87, 38, 32, 12),
        resources.Usage("ive_b", 90, 40, 0, 0),
    ]


def test_resources_are_of_these_sources_and_nothing_spills() -> None:
    report = resources.REPORT.read_text()
    assert f"sources: sha256 {build.source_hash()}" in report, (
        "sources changed: run `python -m internvl_edge.kernels.resources`"
    )
    cells = re.findall(r"(\d+) / (\d+) / (\d+)", report)
    kernels = re.findall(r"^\| (ive_\w+) \|", report, re.MULTILINE)
    assert len(kernels) == 15
    assert len(cells) == len(kernels) * len(build.CUDA_ARCHITECTURES)
    assert {spilled for _, _, spilled in cells} == {"0"}


def _nvcc() -> list[str]:
    try:
        return build.nvcc_command()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.slow(seconds=40)
def test_nvcc_compiles_every_architecture_without_warning_or_spill() -> None:
    architectures = build.supported_architectures(_nvcc())
    usages = resources.measure()
    assert {usage.architecture for usage in usages} == set(architectures)
    assert len({usage.kernel for usage in usages}) == 15
    assert [usage for usage in usages if usage.spill_bytes] == []
    assert {87} <= set(architectures)


@pytest.mark.slow
@pytest.mark.parametrize("source", build.CUDA_SOURCES)
def test_the_fat_binary_holds_every_architecture_and_ptx(source: str) -> None:
    architectures = build.supported_architectures(_nvcc())
    binary = build.cuda_binary(source)
    assert build.cuda_binary(source) == binary
    assert _entries(binary.read_bytes()) == {
        *((MACHINE_CODE, arch) for arch in architectures),
        (PTX, architectures[-1]),
    }


PTX, MACHINE_CODE = 1, 2


def _entries(fat: bytes) -> set[tuple[int, int]]:
    """(kind, architecture) of each entry: a 16-byte header, then entries that state their sizes."""
    magic, _, at, size = struct.unpack_from("<IHHQ", fat)
    assert magic == 0xBA55ED50
    end, entries = at + size, set()
    while at < end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", fat, at)
        entries.add((kind, struct.unpack_from("<I", fat, at + 28)[0]))
        at += header + payload
    return entries
