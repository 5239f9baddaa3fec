"""The report is one file: it parses, fetches nothing, and every plot is drawn."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from internvl_edge.bench.common.plots import COLOURS, FIRST_TOKEN, Bar
from internvl_edge.bench.common.svg import distributions, stacked_bars
from internvl_edge.bench.common.tables import PHASES
from internvl_edge.bench.latency.report import render_html
from internvl_edge.cli.main import main

VOID = {"meta", "br"}
#: What makes a browser fetch something, in attributes and in styles.
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags are closed in order; the names of all tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def plots(text: str) -> list[ElementTree.Element]:
    """Every `svg` element, as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def numbers(path: ElementTree.Element) -> list[float]:
    return [float(value) for value in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]


@pytest.fixture
def report(latency_files: Path) -> str:
    return (latency_files / "report.html").read_text(encoding="utf-8")


def test_it_parses(report: str) -> None:
    page = parse(report)
    assert page.tags.count("svg") == 4  # first token, gaps, bounds, cold start
    assert page.tags.count("table") == 2  # a table a point


def test_it_fetches_nothing(report: str) -> None:
    page = parse(report)
    assert not FETCHING & set(page.attributes)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://|//\w", report)


def test_every_plot_is_drawn(report: str) -> None:
    found = plots(report)
    assert len(found) == 4
    for svg in found:
        width, height = (float(value) for value in svg.attrib["viewBox"].split()[2:])
        paths = list(svg.iter("path"))
        assert len(paths) >= 2
        for path in paths:
            x, y, *_ = numbers(path)
            assert 0 <= x <= width
            assert 0 <= y <= height
        for text in svg.iter("text"):
            assert text.text
            assert 0 <= float(text.attrib["x"]) <= width


def test_bars_are_to_scale(report: str, result: dict[str, Any]) -> None:
    """Widths of the first plot's bars are proportional to the medians."""
    (first, *_) = plots(report)
    point = result["models"][0]["points"][1]["phases"]
    widths: dict[str, float] = {}
    for path in first.iter("path"):
        title = path.find("title")
        if title is not None and title.text:
            widths[title.text.split(":")[0]] = float(path.attrib["d"].split("h")[1].split("v")[0])
    ratio = point["vision"]["median"] / point["prefill"]["median"]
    assert widths["vision"] / widths["prefill"] == pytest.approx(ratio, rel=0.02)


def test_every_figure_is_in_a_table(report: str, result: dict[str, Any]) -> None:
    for point in result["models"][0]["points"]:
        for name, summary in point["phases"].items():
            assert f"<tr><td>{PHASES[name]}</td><td>{1e3 * summary['median']:.3f}</td>" in report


def test_names_are_escaped(result: dict[str, Any]) -> None:
    name = '<b>&"'
    result["models"][0]["name"] = name
    result["notes"].append(name)
    text = render_html(result)
    parse(text)
    plots(text)
    assert name not in text
    assert escape(name) in text


def test_energy_is_shown(result: dict[str, Any]) -> None:
    summary = result["models"][0]["points"][0]["phases"]["ttft"]
    result["energy_source"] = "a sensor"
    for point in result["models"][0]["points"]:
        point["energy"] = {"joules": summary, "watts": summary, "joules_per_token": 0.125}
    assert "0.125 J per token (a sensor)" in render_html(result)


def test_no_gaps_no_plot_of_them(result: dict[str, Any]) -> None:
    for point in result["models"][0]["points"]:
        del point["phases"]["itl"], point["limits"]["itl"]
    assert len(plots(render_html(result))) == 3


def test_a_distribution_rises_to_the_top() -> None:
    svg = ElementTree.fromstring(distributions({"a": [3.0, 1.0, 2.0], "b": [2.0]}, "ms"))
    curves = [path for path in svg.iter("path") if path.attrib.get("stroke-width") == "2"]
    assert len(curves) == 2
    heights = [float(y) for y in re.findall(r"V([\d.]+)", curves[0].attrib["d"])]
    assert heights == sorted(heights, reverse=True)
    assert len(heights) == 3


def test_bars_of_nothing_are_drawn() -> None:
    svg = ElementTree.fromstring(stacked_bars([Bar("none", {"a": 0.0}, "0 ms")], ["a"]))
    assert all("nan" not in path.attrib["d"] for path in svg.iter("path"))


def test_plots_as_a_picture(latency_files: Path, result: dict[str, Any]) -> None:
    """All colours are seen, and the first bar with a picture is to scale."""
    pixels = np.asarray(Image.open(latency_files / "plots.png").convert("RGB"))
    seen = {
        name: (pixels == list(bytes.fromhex(colour[1:]))).all(axis=-1).sum(axis=1)
        for name, colour in zip(FIRST_TOKEN, COLOURS, strict=False)
    }
    assert all(rows.sum() > 100 for rows in seen.values())  # in the legends, if a bar is thin
    # From above, the first rows in which decoding is seen: the bar with a picture. Of these the
    # middle one, as colours are blended at the bar's own edges.
    rows = np.flatnonzero(seen[next(iter(FIRST_TOKEN))])
    bar = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)[0]
    row = int(bar[len(bar) // 2])
    (point,) = (p for p in result["models"][0]["points"] if p["tiles"])
    vision, prefill = (point["phases"][name]["median"] for name in ("vision", "prefill"))
    # Edges between two colours are blended: a pixel at either end.
    expected = seen["prefill"][row] * vision / prefill
    assert seen["vision"][row] == pytest.approx(expected, abs=2 + 2 * vision / prefill)


def test_a_picture_without_matplotlib(
    integer_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "internvl_edge.bench.common.png", raising=False)
    picture = tmp_path / "plots.png"
    assert main(["bench", "latency", str(integer_bundle), "--png", str(picture)]) == 2
    assert "pip install 'internvl-edge[bench]'" in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_plots(latency_files: Path, tmp_path: Path) -> None:
    """Without a network, every name resolving to nothing: the bars' colours are on the screen."""
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=900,2400"]
    page = (latency_files / "report.html").as_uri()
    subprocess.run(
        [str(BROWSER), *options, f"--screenshot={picture}", page],
        capture_output=True,
        timeout=60,
        check=True,
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    for colour in COLOURS[1:3]:  # vision and prefill; what comes first may be too thin to see
        seen = (pixels == list(bytes.fromhex(colour[1:]))).all(axis=-1).sum()
        assert seen > 1000  # squares in the legends have 144
