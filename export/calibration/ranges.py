"""Range analysis: which linear layers must not compute in float16, from calibration.

float16 ends at 65,504 and holds 11 bits down to 6e-5, fewer below. Each unit of the float model
carries probes of what its linear layers read and write and of what its norms read (the residual
stream). A linear layer one of whose values comes too near an end is named, and a graph that
computes in float16 runs it in float32 (`QuantPlan.wide`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from internvl_edge.bundle.contract import Tensor, stored_name
from internvl_edge.export.graphs.graph import GraphBuilder

#: Largest float16 over the headroom: calibration sees few pictures, others reach further.
HEADROOM = 8
END = float(np.finfo(np.float16).max)
LARGEST = END / HEADROOM
#: Least SQNR of a value rounded to float16, in decibels. Normal values have 73, whatever their
#: size; 50 is left when the bulk of a value is ten times below the smallest normal number, and is
#: still 10 above int8 rounding.
LEAST_SQNR_DB = 50.0

INPUT, OUTPUT, NORM = "input", "output", "norm"
_PREFIX = "range:"


@dataclass(frozen=True)
class ValueRange:
    """What calibration saw of one value.

    Attributes:
        place: "input" or "output" of a linear layer, or what a "norm" reads (the residual stream).
        weight: name of that layer's weight.
        largest: the largest magnitude.
        sqnr_db: of the value rounded to float16; -inf where it overflows.
    """

    place: str
    weight: str
    largest: float
    sqnr_db: float

    @property
    def overflows(self) -> bool:
        """Whether float16 has no number for it, or float32 neither."""
        return not self.largest <= END or self.sqnr_db == -np.inf

    @property
    def fits_float16(self) -> bool:
        """Whether float16 holds the value, with the headroom and the precision asked for."""
        return self.largest <= LARGEST and self.sqnr_db >= LEAST_SQNR_DB

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the weight as bundles call it.

        JSON has no infinity: the SQNR is None where the value overflows.
        """
        sqnr = self.sqnr_db if np.isfinite(self.sqnr_db) else None
        return {**asdict(self), "weight": stored_name(self.weight), "sqnr_db": sqnr}


class RangeProbes:
    """Notes a graph's values while it is written, and adds outputs that measure them."""

    def __init__(self, graph: GraphBuilder) -> None:
        self._graph = graph
        self._values: dict[tuple[str, str], str] = {}  # (place, weight) -> value

    def linear(self, weight: str, x: str, y: str) -> None:
        """A linear layer reads `x` and makes `y`."""
        self._values[INPUT, weight] = x
        self._values[OUTPUT, weight] = y

    def norm(self, weight: str, x: str) -> None:
        """A norm reads `x`."""
        self._values[NORM, weight] = x

    def expose(self) -> list[str]:
        """Add one output `(1, 3)` per value: max |x|, sum of x^2, sum of its rounding error^2."""
        return [
            self._measure(f"{_PREFIX}{place}:{weight}", value)
            for (place, weight), value in self._values.items()
        ]

    def _measure(self, name: str, value: str) -> str:
        graph = self._graph
        with graph.scope(name):
            size = graph.node("Abs", [value], "size")
            half = graph.node("Cast", [value], "half", {"to": TensorProto.FLOAT16})
            back = graph.node("Cast", [half], "back", {"to": TensorProto.FLOAT})
            error = graph.node("Sub", [value, back], "error")
            parts = [
                graph.node("ReduceMax", [size], "largest"),
                graph.node("ReduceSumSquare", [value], "signal"),
                graph.node("ReduceSumSquare", [error], "noise"),
            ]
            shape = graph.shape(1, 1)
            parts = [graph.node("Reshape", [part, shape], f"{part}.scalar") for part in parts]
            measured = graph.node("Concat", parts, "measured", {"axis": 1})
        graph.output(measured, Tensor(name, "float32", (1, 3)))
        return name


class RangeCollector:
    """Gathers what the probes of one unit say over many runs."""

    def __init__(self) -> None:
        self._seen: dict[str, NDArray[np.float64]] = {}

    def add(self, name: str, measured: NDArray[Any]) -> None:
        """Take in one probe's output of one run."""
        largest, signal, noise = (float(part) for part in measured.reshape(3))
        before = self._seen.get(name, np.zeros(3))
        self._seen[name] = np.array(
            [np.maximum(before[0], largest), before[1] + signal, before[2] + noise]
        )

    def see(self, place: str, weight: str, values: NDArray[np.float32]) -> None:
        """Take in values that were computed outside of a graph, measured as its probes do."""
        if not values.size:
            return
        wide = values.astype(np.float64)
        with np.errstate(over="ignore"):
            error = wide - values.astype(np.float16)
        measured = [np.abs(wide).max(), (wide**2).sum(), (error**2).sum()]
        self.add(f"{_PREFIX}{place}:{weight}", np.array(measured))

    def values(self) -> Iterator[ValueRange]:
        for name, (largest, signal, noise) in self._seen.items():
            place, weight = name[len(_PREFIX) :].split(":", 1)
            yield ValueRange(place, weight, float(largest), sqnr_db(signal, noise))

    def decisions(self) -> dict[str, Any]:
        """ "range:place:weight" -> [largest, SQNR in dB] of every value float16 does not hold."""
        return {
            f"{_PREFIX}{value.place}:{value.weight}": np.array([value.largest, value.sqnr_db])
            for value in self.values()
            if not value.fits_float16
        }


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantisation noise ratio; a value of zeros loses nothing."""
    if not np.isfinite(noise):
        return -np.inf
    if noise == 0:
        return np.inf
    return float(10 * np.log10(signal / noise))


def ranges_of(decisions: Mapping[str, Any]) -> list[ValueRange]:
    """The values float16 does not hold, back from a calibration's decisions."""
    found = []
    for key, (largest, sqnr) in ((k, v) for k, v in decisions.items() if k.startswith(_PREFIX)):
        place, weight = key[len(_PREFIX) :].split(":", 1)
        found.append(ValueRange(place, weight, float(largest), float(sqnr)))
    return found


def wide_linears(decisions: Mapping[str, Any]) -> frozenset[str]:
    """Weights of the linear layers that read or write a value float16 does not hold.

    What norms read needs no layer: TensorRT dialects keep the residual stream, norms and
    activation functions in float32 whatever calibration finds.
    """
    return frozenset(v.weight for v in ranges_of(decisions) if v.place in (INPUT, OUTPUT))
