"""A latency result's plots as one PNG, drawn by matplotlib; the same as on the HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internvl_edge.bench.common.plots import (
    BOUNDED,
    COLD_START,
    COLOURS,
    FIRST_TOKEN,
    Bar,
    bounds,
    cold_starts,
    first_tokens,
    gaps,
)

#: Inches: across, and down for a row of bars, a title with its legend and axis, a curve.
WIDTH, ROW, HEAD, CURVE = 10.0, 0.35, 1.4, 2.5
DOTS_PER_INCH = 120


def render_png(result: Mapping[str, Any]) -> bytes:
    """The plots one below the other, as the bytes of a PNG file."""
    plots = [
        ("First token, ms; the black line is the bound", first_tokens(result), FIRST_TOKEN),
        ("Share of the bound, %", bounds(result), BOUNDED),
        ("Cold start, ms", cold_starts(result), COLD_START),
    ]
    heights = [HEAD + ROW * len(bars) for _, bars, _ in plots]
    curves = gaps(result)
    if curves:
        heights.append(HEAD + CURVE)
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, bars, names) in zip(axes, plots, strict=False):
        axis.set_title(title, loc="left")
        _bars(axis, bars, names)
    if curves:
        axes[-1].set_title("Time between tokens, ms: share of the gaps at most so long", loc="left")
        for number, (label, values) in enumerate(curves.items()):
            axes[-1].ecdf(values, label=label, color=COLOURS[number % len(COLOURS)])
        axes[-1].legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _bars(axis: Axes, bars: Sequence[Bar], names: Sequence[str]) -> None:
    """Rows of pieces, the first on top; each with its text, and its mark as a black line."""
    rows = range(len(bars))
    ends = [0.0] * len(bars)
    for number, name in enumerate(names):
        widths = [bar.pieces.get(name, 0.0) for bar in bars]
        axis.barh(rows, widths, left=ends, label=name, color=COLOURS[number % len(COLOURS)])
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        axis.annotate(bar.text, (end, row), (6, 0), textcoords="offset points", va="center")
        if bar.mark is not None:
            axis.vlines(bar.mark, row - 0.45, row + 0.45, colors="black", linewidth=2)
    axis.set_yticks(rows, [bar.label for bar in bars])
    axis.invert_yaxis()
    longest = max(*ends, *(bar.mark or 0.0 for bar in bars))
    axis.set_xlim(0, 1.25 * (longest or 1.0))  # room for the text
    axis.legend(fontsize="small", ncols=len(names), loc="upper left", bbox_to_anchor=(0, -0.12))
