"""GPUs that engines are built for and estimates are made of: frozen data, each with its source.

Rates are dense. A rate is not stored but derived, as `SMs x clock x operations per SM and cycle`:
the vendor's headline figures follow from it (the tests compare), and so do the power modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted

GIB = 1 << 30

#: Share of a Jetson's memory that the system sees (carve-outs for firmware and display take the
#: rest), and what a headless Linux leaves taken. Measure on the board with `free -m`.
SHARED_VISIBLE = 0.94
SHARED_SYSTEM_BYTES = int(1.5 * GIB)
#: What the driver of a card keeps for itself.
CARD_RESERVED_BYTES = GIB // 2

#: Multiply and add, dense, per SM and cycle. float32 is without tensor cores. int8 is left out
#: where no figure is published; float16 with float32 accumulation.
_GA10B = {"float32": 256, "float16": 2048, "int8": 4096}
_GA100 = {"float32": 128, "float16": 2048, "int8": 4096}
_AD10X = {"float32": 256, "float16": 1024, "int8": 2048, "float8": 2048}
#: GeForce cards accumulate in float32 at half the rate.
_AD102_GEFORCE = {"float32": 256, "float16": 512, "int8": 2048, "float8": 1024}
_GH100 = {"float32": 256, "float16": 4096, "int8": 8192, "float8": 8192}
_BLACKWELL_THOR = {"float32": 256, "float16": 8192, "float8": 16384, "float4": 32768}

_POWER = "https://docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html"
_ORIN = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-orin/"
_THOR = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor/"


@dataclass(frozen=True)
class PowerMode:
    """One power mode: SMs, their clock in Hz, memory bandwidth in bytes a second."""

    name: str
    sm_count: int
    clock: float
    bandwidth: float


@dataclass(frozen=True)
class Target:
    """One GPU.

    Attributes:
        name: as on the command line.
        title: for people.
        sm: compute capability without the dot.
        memory_bytes: as sold.
        shared: whether CPU and GPU share the memory.
        operations: dense multiply and add operations per SM and cycle, by dtype.
        modes: power modes, the fastest first.
        sources: where the figures come from.
    """

    name: str
    title: str
    sm: int
    memory_bytes: int
    shared: bool
    operations: Mapping[str, int]
    modes: tuple[PowerMode, ...]
    sources: tuple[str, ...]

    @property
    def usable_bytes(self) -> int:
        """Memory a process can have at most."""
        if self.shared:
            return int(self.memory_bytes * SHARED_VISIBLE) - SHARED_SYSTEM_BYTES
        return self.memory_bytes - CARD_RESERVED_BYTES

    def mode(self, name: str | None) -> PowerMode:
        """A power mode by name; None is the fastest.

        Raises:
            UsageError: there is none of that name.
        """
        if name is None:
            return self.modes[0]
        for mode in self.modes:
            if mode.name == name:
                return mode
        known = ", ".join(mode.name for mode in self.modes)
        raise UsageError(f"{self.name} has no power mode {quoted(name)}; it has: {known}")

    def rate(self, dtype: str, mode: PowerMode) -> float:
        """Dense operations a second; a dtype without a published figure runs as float16."""
        per_cycle = self.operations.get(dtype, self.operations["float16"])
        return per_cycle * mode.sm_count * mode.clock


def get_target(name: str) -> Target:
    """A target by name.

    Raises:
        UsageError: unknown name.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise UsageError(f"unknown target {quoted(name)}; known: {known}")


def _card(sm_count: int, clock: float, bandwidth: float) -> tuple[PowerMode, ...]:
    return (PowerMode("default", sm_count, clock, bandwidth),)


#: Power modes: SMs left by the mask of texture clusters (two SMs each), GPU clock, memory clock.
#: LPDDR5 at 3200 MHz is 204.8 GB/s over 256 bits and 102.4 over 128; 2133 MHz is two thirds.
TARGETS = (
    Target(
        "orin-agx-64",
        "Jetson AGX Orin 64GB",
        87,
        64 * GIB,
        True,
        _GA10B,
        (
            PowerMode("maxn", 16, 1.3e9, 204.8e9),
            PowerMode("50w", 16, 816e6, 204.8e9),
            PowerMode("30w", 8, 612e6, 204.8e9),
            PowerMode("15w", 6, 408e6, 136.5e9),
        ),
        (_ORIN, _POWER),
    ),
    Target(
        "orin-agx-32",
        "Jetson AGX Orin 32GB",
        87,
        32 * GIB,
        True,
        _GA10B,
        (
            PowerMode("maxn", 14, 930e6, 204.8e9),
            PowerMode("40w", 14, 816e6, 204.8e9),
            PowerMode("30w", 8, 612e6, 204.8e9),
            PowerMode("15w", 6, 408e6, 136.5e9),
        ),
        (_ORIN, _POWER),
    ),
    Target(
        "orin-nx-16",
        "Jetson Orin NX 16GB",
        87,
        16 * GIB,
        True,
        _GA10B,
        (
            PowerMode("maxn-super", 8, 1.173e9, 102.4e9),
            PowerMode("maxn", 8, 918e6, 102.4e9),
            PowerMode("25w", 8, 408e6, 102.4e9),
            PowerMode("15w", 4, 612e6, 102.4e9),
            PowerMode("10w", 4, 612e6, 68.3e9),
        ),
        (_ORIN, _POWER),
    ),
    Target(
        "orin-nano-8",
        "Jetson Orin Nano 8GB",
        87,
        8 * GIB,
        True,
        _GA10B,
        (
            PowerMode("maxn-super", 8, 1.02e9, 102.4e9),
            PowerMode("25w", 8, 918e6, 102.4e9),
            PowerMode("15w", 8, 625e6, 68.3e9),
        ),
        (_ORIN, _POWER),
    ),
    Target(
        "thor",
        "Jetson AGX Thor (T5000)",
        110,
        128 * GIB,
        True,
        _BLACKWELL_THOR,
        (PowerMode("maxn", 20, 1.575e9, 273e9),),
        (_THOR,),
    ),
    Target(
        "rtx-4090",
        "GeForce RTX 4090",
        89,
        24 * GIB,
        False,
        _AD102_GEFORCE,
        _card(128, 2.52e9, 1008e9),
        (
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
        ),
    ),
    Target(
        "l4",
        "L4",
        89,
        24 * GIB,
        False,
        _AD10X,
        _card(58, 2.04e9, 300e9),
        ("https://www.nvidia.com/en-us/data-center/l4/",),
    ),
    Target(
        "a100",
        "A100 80GB SXM",
        80,
        80 * GIB,
        False,
        _GA100,
        _card(108, 1.41e9, 2039e9),
        ("https://www.nvidia.com/en-us/data-center/a100/",),
    ),
    Target(
        "h100",
        "H100 80GB SXM",
        90,
        80 * GIB,
        False,
        _GH100,
        _card(132, 1.83e9, 3350e9),
        ("https://www.nvidia.com/en-us/data-center/h100/",),
    ),
    Target(
        "h200",
        "H200 141GB SXM",
        90,
        141 * 10**9,
        False,
        _GH100,
        _card(132, 1.83e9, 4800e9),
        ("https://www.nvidia.com/en-us/data-center/h200/",),
    ),
)
