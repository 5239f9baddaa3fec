"""The `bench latency` command: load each bundle, measure every point, print and store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from internvl_edge.bench.common.ceilings import Ceilings, measure_ceilings, read_bandwidth
from internvl_edge.bench.common.limits import Weights, phase_limits
from internvl_edge.bench.common.machine import busy_note, cache_note, describe_machine
from internvl_edge.bench.common.rounds import measure_rounds
from internvl_edge.bench.common.stored import (
    FORMAT,
    VERSION,
    check_writable,
    write_result,
    write_whole,
)
from internvl_edge.bench.common.summaries import Summary, repeat, summarise
from internvl_edge.bench.common.tables import render_text
from internvl_edge.bench.latency.cold_start import cold_start
from internvl_edge.bench.latency.energy import Meter, Reading, open_meter
from internvl_edge.bench.latency.measure import (
    Measured,
    Point,
    Run,
    bundle_name,
    check_tiles,
    collect,
    grid,
    grid_tiles,
    measure_point,
    picture,
)
from internvl_edge.bench.latency.report import render_html
from internvl_edge.bundle.errors import MissingExtraError, UsageError
from internvl_edge.bundle.manifest import Manifest, open_bundle
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.options import add_threads

#: Fresh processes per bundle; each hashes the whole bundle, as a user's load does.
COLD_STARTS = 3
COLD_PROMPT = "What is the total?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--tiles", nargs="+", type=int, default=[1, 4, 13], metavar="N")
    parser.add_argument(
        "--prompt", nargs="+", type=int, default=[64], metavar="N", help="tokens of the question"
    )
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[32], metavar="N")
    parser.add_argument(
        "--rounds", type=int, default=5, help="that count, each with the model loaded anew"
    )
    parser.add_argument("--repeat", type=int, default=3, help="measured runs of a point a round")
    parser.add_argument("--warmup", type=int, default=1, help="runs before them, not counted")
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every sample there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the plots as a picture")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    More rounds are measured than asked for where the machine was in another state meanwhile
    (`bench.common.rounds`).

    Raises:
        UsageError: nothing to repeat, or a bad grid.
        OutputError: an output cannot be written.
        MissingExtraError: plots as PNG are wanted, and matplotlib is not installed.
        DeviceError: a fresh process failed.
        BundleError: not a bundle.
    """
    bundles, rounds, runs = arguments.bundles, arguments.rounds, arguments.repeat
    warmup = arguments.warmup
    if rounds < 1 or runs < 1 or warmup < 0:
        raise UsageError(
            f"--rounds is {rounds}, --repeat {runs} and --warmup {warmup}; at least 1, 1 and 0 are"
            " needed"
        )
    points = grid(arguments.tiles, arguments.prompt, arguments.new_tokens)
    check_writable(arguments.json, arguments.html, arguments.png)
    render_png = None if arguments.png is None else _png_renderer()
    manifests = [open_bundle(path, verify="size").manifest for path in bundles]
    for manifest in manifests:
        for point in points:
            check_tiles(manifest.spec, point.tiles)
    count = arguments.threads or available_cores()
    machine = describe_machine(count)
    names = [bundle_name(path, number, bundles) for number, path in enumerate(bundles)]
    _say("measuring this machine's ceilings")
    precisions = {part for m in manifests for part in (m.vision, m.language)}
    ceilings = measure_ceilings(count, sorted(precisions))
    meter = open_meter()
    largest = max(point.tiles for point in points)
    # First, while nothing of a bundle is in this process.
    cold = []
    for name, path, manifest in zip(names, bundles, manifests, strict=True):
        _say(f"{name}: cold start")
        cold.append(_cold_starts(path, manifest, largest, count, min(rounds * runs, COLD_STARTS)))

    def measure(number: int) -> list[Round]:
        found = []
        for name, path in zip(names, bundles, strict=True):
            _say(f"round {number + 1}, until {rounds} were steady: {name}")
            found.append(_measure_round(path, points, count, runs=runs, warmup=warmup, meter=meter))
        return found

    measured = measure_rounds(rounds, measure, lambda: read_bandwidth(count))
    ceilings = replace(ceilings, read_bytes_per_s=measured.ceiling)
    notes = [*_notes(machine, names, manifests), measured.note]
    models = [
        {
            "name": name,
            "backend": counted[0].backend,
            **_bundle_dict(manifest),
            "cold_start": starts,
            "points": _points(manifest, points, counted, ceilings),
        }
        for name, manifest, starts, *counted in zip(
            names, manifests, cold, *measured.counted, strict=True
        )
    ]
    result = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "notes": [note for note in notes if note],
        "settings": {
            "rounds": len(measured.kept),
            "runs": runs,
            "warmup": warmup,
            "threads": count,
        },
        "ceilings": asdict(ceilings),
        "read_bytes_per_s_between_rounds": measured.read_bytes_per_s,
        "rounds_counted": measured.kept,
        "energy_source": None if meter is None else meter.source,
        "models": models,
    }
    print(render_text(result))
    if arguments.json is not None:
        write_result(result, arguments.json)
    if arguments.html is not None:
        write_whole(render_html(result).encode(), arguments.html)
    if render_png is not None:
        write_whole(render_png(result), arguments.png)
    return 0


def _png_renderer() -> Callable[[Mapping[str, Any]], bytes]:
    """`bench.png.render_png`; before anything is measured, for its library may be absent."""
    try:
        from internvl_edge.bench.common.png import render_png
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--png, other than --html, needs the package {error.name}", extra="bench"
        ) from error
    return render_png


def _notes(
    machine: dict[str, Any], names: Sequence[str], manifests: Sequence[Manifest]
) -> list[str | None]:
    """Return what makes figures doubtful before anything is measured."""
    weights = [sum(Weights.of(manifest).parts.values()) for manifest in manifests]
    return [
        busy_note(machine),
        *(cache_note(machine, name, size) for name, size in zip(names, weights, strict=True)),
    ]


@dataclass(frozen=True)
class Round:
    """One load of a bundle and its way over the grid.

    Attributes:
        backend: what ran it.
        runs: of each point.
    """

    backend: str
    runs: Mapping[Point, Sequence[Run]]


def _measure_round(
    path: Path,
    points: Sequence[Point],
    threads: int,
    *,
    runs: int,
    warmup: int,
    meter: Meter | None,
) -> Round:
    # Nothing is kept between answers: every repetition does the whole work.
    model = InternVL.load(path, device="cpu", threads=threads, verify="size", reuse_bytes=0)
    found = {
        point: measure_point(model, point, runs=runs, warmup=warmup, meter=meter)
        for point in points
    }
    return Round(model.engine.backend.description, found)


def _bundle_dict(manifest: Manifest) -> dict[str, Any]:
    return {
        "precision": manifest.precision,
        "file_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "parts": dict(Weights.of(manifest).parts),
        "spec": manifest.spec.to_dict(),
    }


def _points(
    manifest: Manifest, points: Sequence[Point], rounds: Sequence[Round], ceilings: Ceilings
) -> list[dict[str, Any]]:
    weights = Weights.of(manifest)
    return [
        _point_dict(
            collect(point, [run for found in rounds for run in found.runs[point]]),
            weights,
            ceilings,
        )
        for point in points
    ]


def _cold_starts(
    path: Path, manifest: Manifest, tiles: int, threads: int, count: int
) -> dict[str, Any]:
    """Fresh processes with the grid's largest picture; the first fills the file cache."""
    image, limit = picture(manifest.spec, tiles), grid_tiles(manifest.spec, tiles)
    starts = repeat(
        lambda: cold_start(path, image, COLD_PROMPT, threads=threads, max_tiles=limit),
        runs=count,
        warmup=1,
    )
    return {
        "tiles": tiles,
        "phases": {
            part: _summary_dict(summarise([start[part] for start in starts]))
            for part in ("interpreter", "import", "load", "first_token", "total")
        },
        "loaded_rss_bytes": int(max(start["loaded_rss"] for start in starts)),
        "peak_rss_bytes": int(max(start["peak_rss"] for start in starts)),
    }


def _point_dict(found: Measured, weights: Weights, ceilings: Ceilings) -> dict[str, Any]:
    limits = phase_limits(
        weights,
        ceilings,
        tiles=found.point.tiles,
        prompt_tokens=found.prompt_tokens,
        new_tokens=found.point.new_tokens,
    )
    return {
        **asdict(found.point),
        "prompt_tokens": found.prompt_tokens,
        "phases": {name: _summary_dict(summary) for name, summary in found.phases.items()},
        "rates": {
            "prefill_tokens_per_s": found.prefill_tokens_per_s,
            "decode_tokens_per_s": found.decode_tokens_per_s,
        },
        "limits": {
            name: {
                "bound_s": limit.seconds,
                "by": limit.by,
                "percent": 100 * limit.seconds / found.phases[name].median,
            }
            for name, limit in limits.items()
            if name in found.phases
        },
        "energy": _energy_dict(found.energy, found.point.new_tokens),
    }


def _summary_dict(summary: Summary) -> dict[str, Any]:
    return asdict(summary) | {"samples": list(summary.samples)}


def _energy_dict(readings: Sequence[Reading] | None, tokens: int) -> dict[str, Any] | None:
    """Summarise one first turn: joules, mean watts, joules a generated token with its pictures."""
    if readings is None:
        return None
    joules = summarise([reading.joules for reading in readings])
    watts = summarise([reading.watts for reading in readings])
    return {
        "joules": _summary_dict(joules),
        "watts": _summary_dict(watts),
        "joules_per_token": joules.median / tokens,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
