"""A latency result as one HTML file: tables and inline SVG, no script, nothing fetched.

Plots are SVG: sharp at any size, and no plotting library is needed where the figures are taken. The
same plots as a picture: `bench.png`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from internvl_edge.bench.common.plots import (
    BOUNDED,
    COLD_START,
    FIRST_TOKEN,
    bounds,
    cold_starts,
    first_tokens,
    gaps,
)
from internvl_edge.bench.common.svg import distributions, stacked_bars
from internvl_edge.bench.common.tables import (
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
    yield "<h2>First token</h2><p>Milliseconds; the black line is the bound.</p>"
    yield stacked_bars(first_tokens(result), FIRST_TOKEN)
    if curves := gaps(result):
        yield "<h2>Time between tokens</h2><p>Share of the gaps that are at most so long.</p>"
        yield distributions(curves, "ms")
    yield "<h2>Share of the bound</h2>"
    yield "<p>What the measured ceilings allow, as a share of the time taken.</p>"
    yield stacked_bars(bounds(result), BOUNDED)
    yield "<h2>Cold start</h2><p>Milliseconds in a fresh process.</p>"
    yield stacked_bars(cold_starts(result), COLD_START)
    for model in result["models"]:
        yield from _model(model, result["energy_source"])


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
