"""Features of the CPU that a process runs on, in Linux's names.

The C library is asked first, since it asks the CPU: /proc/cpuinfo shows an emulator's host. It also
leaves out what the operating system does not let a process use.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

_EAX, _EBX, _ECX, _EDX = range(4)

#: Bits by the number that glibc gives a leaf of CPUID (0: leaf 1, 1: leaf 7, 6: leaf 7 subleaf 1)
#: and the register.
_X86: Mapping[tuple[int, int], Mapping[str, int]] = {
    (0, _ECX): {"ssse3": 9, "fma": 12, "sse4_1": 19, "sse4_2": 20, "avx": 28, "f16c": 29},
    (1, _EBX): {
        **{"bmi1": 3, "avx2": 5, "bmi2": 8, "avx512f": 16, "avx512dq": 17, "avx512ifma": 21},
        **{"avx512cd": 28, "avx512bw": 30, "avx512vl": 31},
    },
    (1, _ECX): {
        **{"avx512vbmi": 1, "avx512_vbmi2": 6, "avx512_vnni": 11, "avx512_bitalg": 12},
        **{"avx512_vpopcntdq": 14},
    },
    (1, _EDX): {"amx_bf16": 22, "avx512_fp16": 23, "amx_tile": 24, "amx_int8": 25},
    (6, _EAX): {"avx_vnni": 4, "avx512_bf16": 5},
}

#: Bits by the number of a word in the auxiliary vector: AT_HWCAP, AT_HWCAP2.
_ARM: Mapping[int, Mapping[str, int]] = {
    16: {"asimd": 1, "fphp": 9, "asimdhp": 10, "asimddp": 20, "sve": 22, "asimdfhm": 23},
    26: {"sve2": 1, "svei8mm": 9, "i8mm": 13, "bf16": 14, "sme": 23},
}

_KNOWN = {name for table in (_X86, _ARM) for bits in table.values() for name in bits}


class _Leaf(ctypes.Structure):
    """glibc's `struct cpuid_feature`: what the CPU has, and what a process can use."""

    _fields_ = (("present", ctypes.c_uint32 * 4), ("active", ctypes.c_uint32 * 4))


def cpu_features() -> list[str]:
    """Return the features that choose among kernels and that this process can use, sorted.

    On systems that tell none it is the CPU's name, so that it identifies a kind of CPU everywhere.
    """
    reported = _from_c_library("active")
    features = listed_features() if reported is None else reported
    return sorted(features) or [platform.processor() or platform.machine()]


def is_emulated() -> bool:
    """Return whether /proc/cpuinfo lists features that the CPU of this process lacks.

    A compiler that asks for the CPU it runs on would then compile for another one.
    """
    present = _from_c_library("present")
    return present is not None and not listed_features() <= present


def listed_features(root: Path = Path("/")) -> set[str]:
    """Return the features of the first CPU in /proc/cpuinfo that choose among kernels.

    Args:
        root: of the file system.
    """
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return _KNOWN & set(value.split())
    return set()


def _from_c_library(array: str) -> set[str] | None:
    """Return what the C library says is "present" or "active"; None where it says nothing."""
    machine = platform.machine()
    try:
        if machine in ("x86_64", "AMD64"):
            return set(_x86_features(array))
        if machine == "aarch64":
            return set(_arm_features())
    except (AttributeError, OSError, TypeError):  # glibc before 2.33, another C library
        pass
    return None


def _x86_features(array: str) -> Iterator[str]:
    read = ctypes.CDLL(None).__x86_get_cpuid_feature_leaf
    read.argtypes, read.restype = [ctypes.c_uint], ctypes.POINTER(_Leaf)
    for (leaf, register), bits in _X86.items():
        word = getattr(read(leaf).contents, array)[register]
        yield from (name for name, bit in bits.items() if word >> bit & 1)


def _arm_features() -> Iterator[str]:
    read = ctypes.CDLL(None).getauxval
    read.argtypes, read.restype = [ctypes.c_ulong], ctypes.c_ulong
    for number, bits in _ARM.items():
        word = read(number)
        yield from (name for name, bit in bits.items() if word >> bit & 1)
