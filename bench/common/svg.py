"""Plots as SVG text: bars and distribution curves, no library, no script, nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from internvl_edge.bench.common.plots import COLOURS, Bar

WIDTH, LABEL, VALUE = 860, 230, 110
BAR, GAP = 20, 10
CURVE_HEIGHT, MARGIN = 240, 46
#: Most labels along an axis.
TICKS = 5


def stacked_bars(bars: Sequence[Bar], names: Sequence[str]) -> str:
    """Rows of pieces on one scale, with a legend; a mark is drawn as a black line."""
    longest = max(max(sum(bar.pieces.values()), bar.mark or 0.0) for bar in bars) or 1.0
    scale = (WIDTH - LABEL - VALUE) / longest
    shapes = []
    top = 30
    for bar in bars:
        shapes.append(_text(LABEL - 8, top + 15, bar.label, "end"))
        x = float(LABEL)
        for name, value in bar.pieces.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            shapes.append(
                f'<path d="M{x:.2f} {top}h{value * scale:.2f}v{BAR}h{-value * scale:.2f}z"'
                f' fill="{colour}"><title>{escape(name)}: {value:.4g}</title></path>'
            )
            x += value * scale
        if bar.mark is not None:
            at = LABEL + bar.mark * scale
            shapes.append(
                f'<path d="M{at:.2f} {top - 3}v{BAR + 6}" stroke="#000" stroke-width="2"/>'
            )
        shapes.append(_text(x + 8, top + 15, bar.text, "start"))
        top += BAR + GAP
    return _svg(top, [_legend(names), *shapes])


def distributions(curves: Mapping[str, Sequence[float]], unit: str) -> str:
    """Empirical distribution of each sample: share of values at most x, over x."""
    low = min(min(values) for values in curves.values())
    high = max(max(values) for values in curves.values())
    span = (high - low) or high or 1.0
    width, height = WIDTH - 2 * MARGIN, CURVE_HEIGHT - 2 * MARGIN
    shapes = [_axes(low, span, width, height, unit)]
    for number, values in enumerate(curves.values()):
        ordered = sorted(values)
        path = f"M{MARGIN + (ordered[0] - low) / span * width:.2f} {MARGIN + height}"
        for rank, value in enumerate(ordered, start=1):
            path += f"H{MARGIN + (value - low) / span * width:.2f}"
            path += f"V{MARGIN + height * (1 - rank / len(ordered)):.2f}"
        colour = COLOURS[number % len(COLOURS)]
        shapes.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return _svg(CURVE_HEIGHT, [_legend(list(curves)), *shapes])


def _axes(low: float, span: float, width: int, height: int, unit: str) -> str:
    bottom = MARGIN + height
    shapes = [f'<path d="M{MARGIN} {MARGIN}v{height}h{width}" fill="none" stroke="#444"/>']
    for tick in range(TICKS + 1):
        x = MARGIN + width * tick / TICKS
        value = f"{low + span * tick / TICKS:.3g}" + (f" {unit}" if tick == TICKS else "")
        shapes.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#444"/>')
        shapes.append(_text(x, bottom + 20, value, "middle"))
    for share in (0, 50, 100):
        y = bottom - height * share / 100
        shapes.append(_text(MARGIN - 6, y + 4, f"{share}%", "end"))
    return "".join(shapes)


def _legend(names: Sequence[str]) -> str:
    shapes, x = [], 4
    for number, name in enumerate(names):
        colour = COLOURS[number % len(COLOURS)]
        shapes.append(f'<path d="M{x} 6h12v12h-12z" fill="{colour}"/>')
        shapes.append(_text(x + 17, 17, name, "start"))
        x += 34 + 7 * len(name)
    return "".join(shapes)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, shapes: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">'
        + "".join(shapes)
        + "</svg>"
    )
