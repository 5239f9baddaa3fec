"""Energy of a run, where the platform tells: NVML, Jetson's INA sensors, or RAPL.

Counters (RAPL, NVML on data-centre cards) are read before and after. Sensors that only tell power
are sampled by a thread and integrated. What is measured differs, so the reading says what it is:
a card, a board's input rail, a CPU package. None of them is the wall socket.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

#: Seconds between samples of a power sensor; INA3221 on Jetson renews its values every ~0.5 ms.
INTERVAL = 0.02
#: Rails of the boards that carry the whole module's input, by label.
INPUT_RAILS = ("VDD_IN", "VIN_SYS_5V0", "VDD_GPU_SOC")


@dataclass
class Reading:
    """Filled when the measurement ends: joules over so many seconds."""

    source: str
    joules: float = 0.0
    seconds: float = 0.0

    @property
    def watts(self) -> float:
        return self.joules / self.seconds if self.seconds else 0.0


class Meter(Protocol):
    """Something that can tell the energy of a stretch of time."""

    @property
    def source(self) -> str:
        """Return the name of what is measured, and by what."""

    def measure(self) -> AbstractContextManager[Reading]:
        """A context whose reading is filled when it ends."""


@dataclass(frozen=True)
class CounterMeter:
    """Energy counters in joules that only grow, up to the range at which each wraps (0: never)."""

    source: str
    read: Callable[[], list[float]]
    ranges: tuple[float, ...]

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        reading = Reading(self.source)
        started, before = time.perf_counter(), self.read()
        try:
            yield reading
        finally:
            after = self.read()
            reading.seconds = time.perf_counter() - started
            for low, high, size in zip(before, after, self.ranges, strict=True):
                reading.joules += high - low + (size if high < low else 0.0)


@dataclass(frozen=True)
class PowerMeter:
    """A sensor of watts, sampled by a thread and integrated by the trapezoid rule."""

    source: str
    read: Callable[[], float]
    interval: float = INTERVAL

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        reading = Reading(self.source)
        trace = _Trace()
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(self.interval):
                trace.add(time.perf_counter(), self.read())

        trace.add(time.perf_counter(), self.read())
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield reading
        finally:
            stop.set()
            thread.join()
            trace.add(time.perf_counter(), self.read())
            reading.joules, reading.seconds = trace.integral(), trace.length()


@dataclass
class _Trace:
    times: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)

    def add(self, at: float, watts: float) -> None:
        self.times.append(at)
        self.watts.append(watts)

    def length(self) -> float:
        return self.times[-1] - self.times[0]

    def integral(self) -> float:
        steps = zip(self.times, self.times[1:], self.watts, self.watts[1:], strict=False)
        return sum((end - start) * (low + high) / 2 for start, end, low, high in steps)


def open_meter(root: Path = Path("/sys")) -> Meter | None:
    """The best meter this machine has; None where no energy can be read.

    Args:
        root: where sysfs is mounted.
    """
    return _nvml() or _ina(root) or _rapl(root)


def _nvml() -> Meter | None:
    """The first NVIDIA card, through nvidia-ml-py where that is installed."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None  # no driver: Jetson and machines without a card

    def joules() -> list[float]:
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3]

    try:
        joules()
    except pynvml.NVMLError:  # older cards tell power only

        def watts() -> float:
            return float(pynvml.nvmlDeviceGetPowerUsage(card)) / 1e3

        return PowerMeter("NVML power of GPU 0", watts)
    return CounterMeter("NVML energy of GPU 0", joules, (0.0,))


def _ina(root: Path) -> Meter | None:
    """The module's input rail on a Jetson board (INA3221: millivolts and milliamperes)."""
    rails = {}
    for label in sorted(root.glob("bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        number = label.name[len("in") : -len("_label")]
        volts, amperes = (
            label.with_name(f"in{number}_input"),
            label.with_name(f"curr{number}_input"),
        )
        if volts.exists() and amperes.exists():
            rails[label.read_text(encoding="ascii").strip()] = (volts, amperes)
    name = next((rail for rail in INPUT_RAILS if rail in rails), None)
    if name is None:
        return None
    volts, amperes = rails[name]
    return PowerMeter(f"INA3221 rail {name}", lambda: _number(volts) * _number(amperes) / 1e6)


def _rapl(root: Path) -> Meter | None:
    """All CPU packages by the kernel's powercap counters, where they may be read."""
    zones = sorted(root.glob("class/powercap/intel-rapl:[0-9]*"))
    packages = [zone for zone in zones if zone.name.count(":") == 1]
    counters = [package / "energy_uj" for package in packages]
    try:
        ranges = tuple(_number(zone / "max_energy_range_uj") / 1e6 for zone in packages)
        values = [_number(counter) for counter in counters]
    except (OSError, ValueError):  # since 2020 the counters are for root only
        return None
    if not values:
        return None
    return CounterMeter(
        f"RAPL, {len(counters)} CPU package(s)",
        lambda: [_number(counter) / 1e6 for counter in counters],
        ranges,
    )


def _number(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))
