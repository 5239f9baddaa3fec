"""What quantisation costs, unit by unit: measured during calibration, stored in the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from internvl_edge.bundle.contract import QUANTISATION_REPORT, stored_name
from internvl_edge.bundle.json_reader import read_object
from internvl_edge.export.calibration.decisions import Decisions
from internvl_edge.export.calibration.ranges import NORM, ValueRange
from internvl_edge.export.calibration.run import CalibrationRecord
from internvl_edge.export.checkpoint.names import (
    HEAD_PREFIX,
    PROJECTOR,
    decoder_prefix,
    encoder_prefix,
)


@dataclass(frozen=True)
class UnitCost:
    """One unit run as integers beside itself in float, on the same inputs.

    Attributes:
        sqnr_db: signal to quantisation noise ratio of its output, in decibels.
        cosine: of its output with the float output.
        divergence: mean KL divergence in nats of the model's logits with only this unit quantised
            from the float model's; None where it was not measured.
        linears: for each linear layer, relative squared error of its own output as chosen and
            with plain round to nearest.
    """

    unit: str
    sqnr_db: float
    cosine: float
    divergence: float | None
    linears: Mapping[str, tuple[float, float]]


def unit_costs(decisions: Decisions) -> list[UnitCost]:
    """Costs in the order of the model."""
    costs = []
    for key, (sqnr, cosine) in ((k, v) for k, v in decisions.items() if k.startswith("unit:")):
        unit = key[len("unit:") :]
        prefix = tensor_prefix(unit)
        linears = {
            name: (float(value[0]), float(value[1]))
            for name, value in sorted(
                (stored_name(k[len("error:") :]), v.tolist())
                for k, v in decisions.items()
                if k.startswith("error:")
            )
            if name.startswith(prefix)
        }
        found = decisions.get(f"divergence:{unit}")
        divergence = None if found is None else float(found)
        costs.append(UnitCost(unit, float(sqnr), float(cosine), divergence, linears))
    return costs


def most_sensitive(costs: Sequence[UnitCost], count: int) -> tuple[str, ...]:
    """Tensor prefixes of the `count` units that cost most.

    By the divergence of the logits (tiny_ocr, INT8 and INT4, four of ten units kept: 2.1e-3 nats
    in all, 4.5e-3 with the lowest SQNR kept); by SQNR where that was not measured for all.
    """

    def loss(cost: UnitCost) -> float:
        return -cost.sqnr_db if cost.divergence is None else cost.divergence

    known = all(cost.divergence is not None for cost in costs)
    comparable = costs if known else [replace(cost, divergence=None) for cost in costs]
    ranked = sorted(comparable, key=loss, reverse=True)
    return tuple(tensor_prefix(cost.unit) for cost in ranked[:count])


def tensor_prefix(unit: str) -> str:
    """Return how bundles begin the names of a unit's linear layers."""
    part, _, layer = unit.partition(".")
    number = int(layer or 0)
    prefixes = {
        "vision": encoder_prefix(number),
        "projector": PROJECTOR,
        "language": decoder_prefix(number),
        "head": HEAD_PREFIX,
    }
    return stored_name(prefixes[part])


def render_report(bundle: Path) -> str:
    """The stored report as a table, with a mark at the units kept at half precision.

    What float16 does not hold follows, where that was looked for.
    """
    report = read_object(bundle / QUANTISATION_REPORT)
    lines = [f"{'unit':14} {'SQNR dB':>8} {'cosine':>9} {'KL nats':>9}"] if report["units"] else []
    for cost in report["units"]:
        kept = tensor_prefix(cost["unit"]) in report["kept_fp16"]
        divergence = cost["divergence"]
        nats = f"{'-':>9}" if divergence is None else f"{divergence:9.2e}"
        line = f"{cost['unit']:14} {cost['sqnr_db']:8.1f} {cost['cosine']:9.6f} {nats}"
        lines.append(line + ("  kept fp16" if kept else ""))
    outside = report["outside_float16"]
    if outside is not None:
        wide = {value["weight"] for value in outside if value["place"] != NORM}
        lines.append(f"{len(wide)} linear layers kept fp32: float16 does not hold their values")
    return "\n".join(lines)


def to_json(
    record: CalibrationRecord,
    costs: Sequence[UnitCost],
    kept: Sequence[str],
    outside: Sequence[ValueRange] | None = None,
) -> str:
    """What is stored in the bundle; `outside` are the values that float16 does not hold, or
    None where nothing computes in it.
    """
    report = {
        "calibration": asdict(record),
        "units": [asdict(cost) for cost in costs],
        "kept_fp16": list(kept),
        "outside_float16": None if outside is None else [value.to_dict() for value in outside],
    }
    return json.dumps(report, indent=2) + "\n"
