"""How many are served at once, and how long each waits: tokens a second against concurrency.

    internvl-edge bench latency throughput BUNDLE [--concurrency 1 2 4 8 16 32] [--tiles 0 1]
                                           [--json FILE] [--png FILE]

Requests of drawn questions, pictures and lengths arrive as a Poisson process, `--load` times as
fast as so many would be answered if each took as long as alone; at most that many are under way.
Before that each of some is asked alone: what it then answers, it has to answer among others. With
`--beside`, a picture of so many tiles is asked about while four answers are under way.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from internvl_edge.bench.common.machine import busy_note, describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result, write_whole
from internvl_edge.bench.common.summaries import Summary, summarise
from internvl_edge.bench.latency.load import Answered, Asked, Mix, answer, arrive, draw, interfere
from internvl_edge.bench.latency.measure import check_tiles
from internvl_edge.bundle.errors import MeasurementError, MissingExtraError, UsageError
from internvl_edge.kernels.ops import available_cores
from internvl_edge.runtime import InternVL, Policy
from internvl_edge.runtime.options import add_threads

FORMAT = "internvl-edge throughput"
VERSION = 1
#: Answers under way when another request arrives, for `--beside`.
BESIDE = 4
PERCENTILES = ("median", "p90", "p99", "maximum")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="N"
    )
    parser.add_argument("--requests", type=int, default=32, help="of each concurrency")
    parser.add_argument(
        "--load", type=float, default=1.0, help="arrivals, as a multiple of what is answered alone"
    )
    parser.add_argument("--tiles", nargs="+", type=int, default=[0, 1], metavar="N")
    parser.add_argument("--prompt", nargs="+", type=int, default=[16, 64, 256], metavar="N")
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[16, 64], metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--beside", type=int, metavar="TILES", help=f"ask about so many while {BESIDE} are answered"
    )
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every sample there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the plots as a picture")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: a number is none that can be measured.
        OutputError: an output cannot be written.
        MissingExtraError: plots are wanted, and matplotlib is not installed.
        MeasurementError: an answer is not what it is alone.
        BundleError: not a bundle.
    """
    _check(arguments)
    check_writable(arguments.json, arguments.png)
    draw_png = None if arguments.png is None else _drawing()
    threads = arguments.threads or available_cores()
    mix = Mix(arguments.tiles, arguments.prompt, arguments.new_tokens, arguments.seed)
    model = _load(arguments.bundle, threads, 1)
    for tiles in (*mix.tiles, *([arguments.beside] if arguments.beside else [])):
        check_tiles(model.spec, tiles)
    asked = draw(model, mix, arguments.requests)
    machine = describe_machine(threads)
    _alone(model, asked[0])  # warm
    alone = [_alone(model, one) for one in asked]
    model.close()
    each_s = sum(one.ended - one.arrived for one in alone) / len(alone)
    points = []
    for concurrency in arguments.concurrency:
        _say(f"{concurrency} at once")
        model = _load(arguments.bundle, threads, concurrency)
        gap = each_s / (arguments.load * concurrency)
        answered = asyncio.run(arrive(model, asked, gap))
        model.close()
        points.append({"concurrency": concurrency, "mean_gap_s": gap, **_point(answered, alone)})
    result = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "notes": [note for note in [busy_note(machine)] if note],
        "settings": {"requests": len(asked), "load": arguments.load, **asdict(mix)},
        "backend": model.engine.backend.description,
        "alone": _rates(alone),
        "points": points,
        "beside": _beside(arguments, threads) if arguments.beside else None,
    }
    print("\n".join(render(result)))
    if arguments.json is not None:
        write_result(result, arguments.json)
    if draw_png is not None:
        write_whole(draw_png(result), arguments.png)
    return 0


def render(result: Mapping[str, Any]) -> list[str]:
    """Return the result as lines of text."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {result['backend']}",
        f"{result['settings']['requests']} requests of each concurrency; alone"
        f" {result['alone']['tokens_per_s']:.1f} tokens/s",
        f"{'at once':>8} {'tokens/s':>9} {'x alone':>8} {'TTFT ms, median p90 p99':>32}"
        f" {'between tokens ms, median p90 p99':>36}",
    ]
    for point in result["points"]:
        rate = point["tokens_per_s"]
        lines.append(
            f"{point['concurrency']:8d} {rate:9.1f} {rate / result['alone']['tokens_per_s']:8.2f}"
            f" {_milliseconds(point['ttft']):>32} {_milliseconds(point['itl']):>36}"
        )
    if (beside := result["beside"]) is not None:
        lines.append(
            f"{beside['tiles']} tiles beside {BESIDE} answers, between tokens ms, median p90 p99:"
            f" {_milliseconds(beside['before'])} before, {_milliseconds(beside['meanwhile'])}"
            f" meanwhile ({beside['ratio_p99']:.2f} times at p99), {beside['ttft_s']:.2f} s to its"
            " first token"
        )
    return [*lines, *(f"note: {note}" for note in result["notes"])]


def _check(arguments: argparse.Namespace) -> None:
    for option, values, least in (
        ("--concurrency", arguments.concurrency, 1),
        ("--requests", [arguments.requests], 1),
        ("--tiles", arguments.tiles, 0),
        ("--prompt", arguments.prompt, 1),
        ("--new-tokens", arguments.new_tokens, 2),
        ("--beside", [1 if arguments.beside is None else arguments.beside], 1),
    ):
        if (worst := min(values)) < least:
            raise UsageError(f"{option} has {worst}, it must be at least {least}")
    if not arguments.load > 0:
        raise UsageError(f"--load is {arguments.load}, it must be above 0")


def _drawing() -> Any:
    """`bench.latency.throughput_plot.draw`; before anything is measured: its library may lack."""
    try:
        from internvl_edge.bench.latency.throughput_plot import draw as draw_png
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--png needs the package {error.name}", extra="bench") from error
    return draw_png


def _load(bundle: Path, threads: int, most: int) -> InternVL:
    """A model that keeps nothing between answers."""
    policy = Policy(most_running=most)
    return InternVL.load(
        bundle, device="cpu", threads=threads, verify="size", reuse_bytes=0, policy=policy
    )


def _alone(model: InternVL, asked: Asked) -> Answered:
    """What a request is answered with nobody else there."""
    return asyncio.run(answer(model, asked))


def _point(answered: Sequence[Answered], alone: Sequence[Answered]) -> dict[str, Any]:
    """Summarise what was measured.

    Raises:
        MeasurementError: an answer is not what it was alone.
    """
    same = sum(one.token_ids == other.token_ids for one, other in zip(answered, alone, strict=True))
    if not same:
        raise MeasurementError("no answer among others is what it is alone: nothing was measured")
    return {**_rates(answered), "same_answers": same}


def _rates(answered: Sequence[Answered]) -> dict[str, Any]:
    tokens = sum(len(one.token_ids) for one in answered)
    busy = busy_seconds([(one.arrived, one.ended) for one in answered])
    return {
        "tokens_per_s": tokens / busy,
        "requests_per_s": len(answered) / busy,
        "ttft": _summary(summarise([one.ttft for one in answered])),
        "itl": _summary(summarise([gap for one in answered for gap in one.gaps])),
    }


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which anything was under way."""
    total, until = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def _beside(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Ask about a picture while others are answered; what that does to the time between tokens."""
    model = _load(arguments.bundle, threads, BESIDE + 1)
    text = Mix([0], [max(arguments.prompt)], [model.max_context], arguments.seed)
    picture = Mix([arguments.beside], [min(arguments.prompt)], [2], arguments.seed + 1)
    asked = [*draw(model, text, BESIDE), *draw(model, picture, 1)]
    found = interfere(model, asked)
    model.close()
    before, meanwhile = summarise(found.before), summarise(found.meanwhile)
    return {
        "tiles": arguments.beside,
        "before": _summary(before),
        "meanwhile": _summary(meanwhile),
        "ratio_p99": meanwhile.p99 / before.p99,
        "ttft_s": found.ttft,
    }


def _summary(summary: Summary) -> dict[str, Any]:
    return {**asdict(summary), "samples": list(summary.samples)}


def _milliseconds(summary: Mapping[str, float]) -> str:
    return " ".join(f"{1e3 * summary[name]:.1f}" for name in PERCENTILES[:3])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
