"""What is plotted of a latency result: bars and curves, for a page's SVG and for a PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.bench.common.tables import COLD_PHASES, PHASES

#: Okabe and Ito's colours: told apart with any kind of colour vision.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
#: What a first token is made of; the rest is the runtime's own work (tokenising, gathering).
PREPROCESS, REST = "decode + tile", "rest"
FIRST_TOKEN = (PREPROCESS, "vision", "prefill", REST)
_BOUNDED = ("vision", "prefill", "itl")
BOUNDED = tuple(PHASES[name] for name in _BOUNDED)
COLD_START = COLD_PHASES[:-1]


@dataclass(frozen=True)
class Bar:
    """One row: pieces side by side by name, a text behind them, and a mark to compare with."""

    label: str
    pieces: Mapping[str, float]
    text: str
    mark: float | None = None


def first_tokens(result: Mapping[str, Any]) -> list[Bar]:
    """Milliseconds to the first token by phase, `FIRST_TOKEN`; the mark is the bound."""
    bars = []
    for label, point in _points(result):
        median = {name: summary["median"] * 1e3 for name, summary in point["phases"].items()}
        pieces = {
            PREPROCESS: median.get("decode_image", 0.0) + median.get("tile", 0.0),
            "vision": median.get("vision", 0.0),
            "prefill": median["prefill"],
        }
        pieces[REST] = max(0.0, median["ttft"] - sum(pieces.values()))
        bound = point["limits"]["ttft"]["bound_s"] * 1e3
        bars.append(Bar(label, pieces, f"{median['ttft']:.1f} ms", bound))
    return bars


def gaps(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Milliseconds between tokens, every sample of each point."""
    return {
        label: [1e3 * gap for gap in point["phases"]["itl"]["samples"]]
        for label, point in _points(result)
        if "itl" in point["phases"]
    }


def bounds(result: Mapping[str, Any]) -> list[Bar]:
    """Percent of what the ceilings allow, a bar for each of `BOUNDED`."""
    bars = []
    for label, point in _points(result):
        for name in _BOUNDED:
            if (limit := point["limits"].get(name)) is not None:
                text = f"{limit['percent']:.0f}% ({limit['by']})"
                bars.append(Bar(label, {PHASES[name]: limit["percent"]}, text))
    return bars


def cold_starts(result: Mapping[str, Any]) -> list[Bar]:
    """Milliseconds of a fresh process by phase, `COLD_START`."""
    bars = []
    for model in result["models"]:
        phases = model["cold_start"]["phases"]
        pieces = {name: phases[name]["median"] * 1e3 for name in COLD_START}
        bars.append(Bar(model["name"], pieces, f"{phases['total']['median'] * 1e3:.0f} ms"))
    return bars


def _points(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every point with a short label."""
    for model in result["models"]:
        for point in model["points"]:
            text, new = point["text_tokens"], point["new_tokens"]
            yield f"{model['name']}, {point['tiles']} tiles, {text}+{new}", point
