"""A throughput result's plots as one PNG, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internvl_edge.bench.common.plots import COLOURS

DOTS_PER_INCH = 120
SHOWN = ("median", "p90", "p99")


def draw(result: Mapping[str, Any]) -> bytes:
    """Tokens a second, time to first token, time between tokens, as the bytes of a PNG file."""
    figure = Figure(figsize=(10.0, 9.0), dpi=DOTS_PER_INCH, layout="constrained")
    rate, ttft, itl = figure.subplots(3, sharex=True)
    at_once = [point["concurrency"] for point in result["points"]]
    rate.plot(at_once, [point["tokens_per_s"] for point in result["points"]], "o-", c=COLOURS[0])
    rate.axhline(result["alone"]["tokens_per_s"], color="black", linewidth=1, label="one by one")
    rate.set_title("Tokens a second, all requests together", loc="left")
    rate.set_ylim(bottom=0)
    rate.legend(fontsize="small")
    _percentiles(ttft, "ttft", "Time to first token, ms, waiting included", result)
    _percentiles(itl, "itl", "Time between tokens, ms", result)
    itl.set_xscale("log", base=2)
    itl.set_xticks(at_once, [str(number) for number in at_once])
    itl.set_xlabel("requests at once")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _percentiles(axis: Axes, phase: str, title: str, result: Mapping[str, Any]) -> None:
    points = result["points"]
    for colour, name in zip(COLOURS, SHOWN, strict=False):
        axis.plot(
            [point["concurrency"] for point in points],
            [1e3 * point[phase][name] for point in points],
            "o-",
            color=colour,
            label=name,
        )
    axis.set_title(title, loc="left")
    axis.set_yscale("log")
    axis.legend(fontsize="small")
