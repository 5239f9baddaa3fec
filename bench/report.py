"""A latency result as one HTML file: tables and inline SVG, no script, nothing fetched.

Plots are SVG only: a page holds them sharp at any size, a browser saves or prints them, and no
plotting library is needed where the figures are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from internvl_edge.bench.svg import Bar, distributions, stacked_bars
from internvl_edge.bench.tables import (
    COLD_PHASES,
    PHASES,
    ceiling_line,
    energy_line,
    machine_line,
    memory_line,
    point_line,
    precision_line,
    settings_line,
)

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .7em;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}
svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif}
.note{background:#fff3cd;padding:.4em .8em}
"""
COLUMNS = ("median", "p25", "p75", "p90", "p99")
#: What a first token is made of; the rest is the runtime's own work (tokenising, gathering).
PREPROCESS, REST = "decode + tile", "rest"
FIRST_TOKEN = (PREPROCESS, "vision", "prefill", REST)


def render_html(result: Mapping[str, Any]) -> str:
    """The whole page."""
    body = "".join(_body(result))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>internvl-edge latency</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _body(result: Mapping[str, Any]) -> Iterator[str]:
    yield "<h1>internvl-edge latency</h1>"
    yield f"<p>{escape(machine_line(result))}<br>"
    yield f"ceilings measured with it: {escape(ceiling_line(result))}<br>"
    yield f"{settings_line(result)}, {result['created']}</p>"
    for note in result["notes"]:
        yield f'<p class="note">{escape(note)}</p>'
    yield "<h2>First token</h2>"
    yield _first_tokens(result)
    if curves := _gaps(result):
        yield "<h2>Time between tokens</h2><p>Share of the gaps that are at most so long.</p>"
        yield distributions(curves, "ms")
    yield "<h2>Share of the bound</h2>"
    yield "<p>What the measured ceilings allow, as a share of the time taken.</p>"
    yield _bounds(result)
    yield "<h2>Cold start</h2>"
    yield _cold(result)
    for model in result["models"]:
        yield from _model(model, result["energy_source"])


def _first_tokens(result: Mapping[str, Any]) -> str:
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
    return "<p>Milliseconds; the black line is the bound.</p>" + stacked_bars(bars, FIRST_TOKEN)


def _gaps(result: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        label: [1e3 * gap for gap in point["phases"]["itl"]["samples"]]
        for label, point in _points(result)
        if "itl" in point["phases"]
    }


def _bounds(result: Mapping[str, Any]) -> str:
    names = [PHASES[name] for name in ("vision", "prefill", "itl")]
    bars = []
    for label, point in _points(result):
        for name in ("vision", "prefill", "itl"):
            if (limit := point["limits"].get(name)) is not None:
                text = f"{limit['percent']:.0f}% ({limit['by']})"
                bars.append(Bar(label, {PHASES[name]: limit["percent"]}, text))
    return stacked_bars(bars, names)


def _cold(result: Mapping[str, Any]) -> str:
    bars = []
    for model in result["models"]:
        phases = model["cold_start"]["phases"]
        pieces = {name: phases[name]["median"] * 1e3 for name in COLD_PHASES[:-1]}
        bars.append(Bar(model["name"], pieces, f"{phases['total']['median'] * 1e3:.0f} ms"))
    return "<p>Milliseconds in a fresh process.</p>" + stacked_bars(bars, COLD_PHASES[:-1])


def _points(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every point with a short label."""
    for model in result["models"]:
        for point in model["points"]:
            text, new = point["text_tokens"], point["new_tokens"]
            yield f"{model['name']}, {point['tiles']} tiles, {text}+{new}", point


def _model(model: Mapping[str, Any], source: str | None) -> Iterator[str]:
    yield f"<h2>{escape(model['name'])}</h2><p>{escape(precision_line(model))}<br>"
    yield f"{escape(model['backend'])}<br>{escape(memory_line(model))}</p>"
    for point in model["points"]:
        yield f"<h3>{escape(point_line(point))}</h3><p>{escape(energy_line(point, source))}</p>"
        heads = ["ms", *COLUMNS, "outliers", "bound", "of bound"]
        yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
        for name in (name for name in PHASES if name in point["phases"]):
            cells = "".join(f"<td>{cell}</td>" for cell in _cells(point, name))
            yield f"<tr><td>{PHASES[name]}</td>{cells}</tr>"
        yield "</table>"


def _cells(point: Mapping[str, Any], name: str) -> list[str]:
    summary, limit = point["phases"][name], point["limits"].get(name)
    cells = [f"{1e3 * summary[column]:.3f}" for column in COLUMNS]
    cells.append(f"{summary['outliers']}/{len(summary['samples'])}")
    if limit is None:
        return [*cells, "", ""]
    return [*cells, f"{1e3 * limit['bound_s']:.3f}", f"{limit['percent']:.0f}%"]
