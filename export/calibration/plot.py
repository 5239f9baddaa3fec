"""The cost of quantisation, unit by unit, as a picture: self-contained SVG, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from internvl_edge.export.calibration.report import UnitCost, tensor_prefix

#: Pixels: one unit's row, its bar, the columns of names and of values, a panel of bars.
ROW, BAR, NAMES, PANEL, VALUES, TOP = 16, 11, 100, 240, 70, 44
QUANTISED, KEPT, INK = "#4878a8", "#b0b0b0", "#222222"


@dataclass(frozen=True)
class Panel:
    """One measure: a bar per unit from `low` to its place, and the value beside it as text."""

    title: str
    values: Sequence[float]
    texts: Sequence[str]
    low: float
    high: float

    def width(self, value: float) -> float:
        """Pixels of a bar."""
        span = max(self.high - self.low, 1e-9)
        return PANEL * min(max((value - self.low) / span, 0.0), 1.0)


def cost_plot(costs: Sequence[UnitCost], kept: Sequence[str]) -> str:
    """SVG with one row per unit: SQNR and, where it was measured, KL divergence (log scale).

    Args:
        kept: tensor prefixes of the units kept at half precision; their bars are grey.
    """
    panels = [_sqnr(costs)]
    if costs and all(cost.divergence is not None for cost in costs):
        panels.append(_divergence([cost.divergence or 0.0 for cost in costs]))
    width = NAMES + len(panels) * (PANEL + VALUES)
    height = TOP + ROW * (len(costs) + 1)
    grey = [tensor_prefix(cost.unit) in kept for cost in costs]
    body = [_text(8, 18, "What each quantised unit costs by itself (grey: kept at fp16)")]
    for row, cost in enumerate(costs):
        body.append(_text(8, _middle(row), cost.unit))
    for index, panel in enumerate(panels):
        body += _bars(panel, NAMES + index * (PANEL + VALUES), grey)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11"'
            f' fill="{INK}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _sqnr(costs: Sequence[UnitCost]) -> Panel:
    values = [cost.sqnr_db for cost in costs]
    texts = [f"{value:.1f}" for value in values]
    return Panel("SQNR of its output, dB", values, texts, 0.0, max(values, default=1.0))


def _divergence(nats: Sequence[float]) -> Panel:
    """Logarithmic, from the decade below the smallest; a divergence of zero has no bar."""
    logs = [math.log10(max(value, 1e-12)) for value in nats]
    texts = [f"{value:.1e}" for value in nats]
    return Panel(
        "KL divergence of the logits, nats (log)", logs, texts, math.floor(min(logs)), max(logs)
    )


def _bars(panel: Panel, left: int, grey: Sequence[bool]) -> Iterable[str]:
    yield _text(left, 36, panel.title)
    for row, (value, text, is_kept) in enumerate(zip(panel.values, panel.texts, grey, strict=True)):
        wide, y = panel.width(value), TOP + row * ROW
        yield (
            f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="{BAR}"'
            f' fill="{KEPT if is_kept else QUANTISED}"/>'
        )
        yield _text(left + wide + 4, _middle(row), text)


def _middle(row: int) -> int:
    """Baseline of a row's text."""
    return TOP + row * ROW + BAR - 2


def _text(x: float, y: float, content: str) -> str:
    return f'<text x="{x:.1f}" y="{y}">{escape(content)}</text>'
