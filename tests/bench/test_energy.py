"""Meters over files and functions that stand in for sensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.bench.latency.energy import CounterMeter, Meter, PowerMeter, open_meter


def write(folder: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card in the machine that tests would come before the files."""
    monkeypatch.setattr("internvl_edge.bench.latency.energy._nvml", lambda: None)


def test_nothing_to_read(tmp_path: Path) -> None:
    assert open_meter(tmp_path) is None


def test_counters_of_all_packages_and_their_wrap(tmp_path: Path) -> None:
    zones = [f"class/powercap/intel-rapl:{number}" for number in range(2)]
    for zone in zones:
        write(tmp_path, {f"{zone}/energy_uj": 900_000, f"{zone}/max_energy_range_uj": 1_000_000})
    # A part of the first package: counted there already.
    part = "class/powercap/intel-rapl:0:0"
    write(tmp_path, {f"{part}/energy_uj": 0, f"{part}/max_energy_range_uj": 1_000_000})
    meter = open_meter(tmp_path)
    assert meter is not None
    assert meter.source == "RAPL, 2 CPU package(s)"
    with meter.measure() as reading:
        write(tmp_path, {f"{zones[0]}/energy_uj": 950_000, f"{zones[1]}/energy_uj": 100_000})
    assert reading.joules == pytest.approx(0.05 + 0.2)
    assert reading.seconds > 0
    assert reading.watts == pytest.approx(reading.joules / reading.seconds)


def test_counters_for_root_only(tmp_path: Path) -> None:
    write(tmp_path, {"class/powercap/intel-rapl:0/max_energy_range_uj": 1_000_000})
    assert open_meter(tmp_path) is None


def test_input_rail_of_a_jetson(tmp_path: Path) -> None:
    sensor = "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    for number, (label, milliamperes) in enumerate([("VDD_CPU_CV", 1), ("VDD_IN", 2400)], start=1):
        values = {"in{}_label": label, "in{}_input": 5000, "curr{}_input": milliamperes}
        write(tmp_path, {f"{sensor}/{k.format(number)}": value for k, value in values.items()})
    meter = open_meter(tmp_path)
    assert isinstance(meter, PowerMeter)
    assert meter.source == "INA3221 rail VDD_IN"
    assert meter.read() == pytest.approx(12.0)  # 5 V, 2.4 A


def test_constant_power_is_integrated() -> None:
    with PowerMeter("constant", lambda: 8.0, interval=0.001).measure() as reading:
        pass
    assert reading.joules == pytest.approx(8.0 * reading.seconds)
    assert reading.watts == pytest.approx(8.0)


@pytest.mark.parametrize(
    "meter",
    [CounterMeter("a counter", lambda: [1.0], (0.0,)), PowerMeter("a sensor", lambda: 1.0)],
    ids=["counter", "sensor"],
)
def test_a_reading_survives_an_error(meter: Meter) -> None:
    with pytest.raises(KeyError), meter.measure() as reading:
        raise KeyError
    assert reading.seconds > 0
