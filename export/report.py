"""What quantisation costs, unit by unit: measured during calibration, stored in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internvl_edge.export.calibration_run import CalibrationRecord
from internvl_edge.export.decisions import Decisions
from internvl_edge.export.mapping import LANGUAGE, PROJECTOR, VISION
from internvl_edge.runtime.contract import QUANTISATION_REPORT


@dataclass(frozen=True)
class UnitCost:
    """One unit run as integers beside itself in float, on the same inputs.

    Attributes:
        sqnr_db: signal to quantisation noise ratio of its output, in decibels.
        cosine: of its output with the float output.
        linears: for each linear layer, relative squared error of its own output as chosen and
            with plain round to nearest.
    """

    unit: str
    sqnr_db: float
    cosine: float
    linears: Mapping[str, tuple[float, float]]


def unit_costs(decisions: Decisions) -> list[UnitCost]:
    """Costs in the order of the model."""
    costs = []
    for key, (sqnr, cosine) in ((k, v) for k, v in decisions.items() if k.startswith("unit:")):
        unit = key[len("unit:") :]
        prefix = tensor_prefix(unit)
        linears = {
            name: (float(value[0]), float(value[1]))
            for name, value in (
                (k[len("error:") :], v) for k, v in decisions.items() if k.startswith("error:")
            )
            if name.startswith(prefix)
        }
        costs.append(UnitCost(unit, float(sqnr), float(cosine), linears))
    return costs


def most_sensitive(costs: Sequence[UnitCost], count: int) -> tuple[str, ...]:
    """Tensor prefixes of the `count` units with the lowest SQNR."""
    ranked = sorted(costs, key=lambda cost: cost.sqnr_db)
    return tuple(tensor_prefix(cost.unit) for cost in ranked[:count])


def tensor_prefix(unit: str) -> str:
    """How the names of a unit's linear layers begin."""
    part, _, layer = unit.partition(".")
    return {
        "vision": f"{VISION}.encoder.layers.{layer}.",
        "projector": f"{PROJECTOR}.",
        "language": f"{LANGUAGE}.model.layers.{layer}.",
        "head": f"{LANGUAGE}.output.",
    }[part]


def render_report(bundle: Path) -> str:
    """The stored report as a table: unit, SQNR, cosine, whether it was kept at half precision."""
    report = json.loads((bundle / QUANTISATION_REPORT).read_text(encoding="utf-8"))
    lines = [f"{'unit':14} {'SQNR dB':>8} {'cosine':>9}"]
    for cost in report["units"]:
        kept = tensor_prefix(cost["unit"]) in report["kept_fp16"]
        line = f"{cost['unit']:14} {cost['sqnr_db']:8.1f} {cost['cosine']:9.6f}"
        lines.append(line + ("  kept fp16" if kept else ""))
    return "\n".join(lines)


def to_json(record: CalibrationRecord, costs: Sequence[UnitCost], kept: Sequence[str]) -> str:
    """What is stored in the bundle."""
    report = {
        "calibration": asdict(record),
        "units": [asdict(cost) for cost in costs],
        "kept_fp16": list(kept),
    }
    return json.dumps(report, indent=2) + "\n"
