"""The `bench estimate` command: a model on a target, or a stored result held against itself.

internvl-edge bench estimate CHECKPOINT|BUNDLE|internvl-1.5 --target orin-agx-64 [--power MODE]
internvl-edge bench estimate RESULT.json      # predictions beside what was measured
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

from internvl_edge.bench.common.ceilings import Ceilings
from internvl_edge.bench.common.limits import Weights
from internvl_edge.bench.common.stored import read_result
from internvl_edge.bench.estimate.model import (
    ANSWER,
    Device,
    Efficiency,
    Request,
    Speed,
    memory_bytes,
    predict,
    remedies,
    weights_of,
)
from internvl_edge.bench.estimate.published import published_error
from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.bundle.contract import (
    MANIFEST,
    CachePrecision,
    LanguagePrecision,
    VisionPrecision,
)
from internvl_edge.bundle.errors import CheckpointError, UsageError
from internvl_edge.bundle.json_reader import JsonError, read_object
from internvl_edge.bundle.manifest import read_manifest
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.tensorrt.targets import GIB, TARGETS, PowerMode, Target, get_target
from internvl_edge.runtime.options import filled

#: A short name for the model this project is about.
ALIASES = {"internvl-1.5": "internvl-chat-v1-5"}
PHASES = ("vision", "prefill", "itl")


@dataclass(frozen=True)
class Wish:
    """The command's options; None is decided here."""

    vision: VisionPrecision | None
    language: LanguagePrecision | None
    kv: CachePrecision | None
    tiles: int | None
    prompt: int
    context: int | None
    block: int
    arithmetic: float | None
    bandwidth: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "model",
        metavar="MODEL|RESULT",
        help="checkpoint, bundle, internvl-1.5; or a stored latency result, to predict it anew",
    )
    parser.add_argument("--target", metavar="NAME", help="such as orin-agx-64, thor, h100")
    parser.add_argument("--power", metavar="MODE", help="power mode (default: the fastest)")
    parser.add_argument("--vision", choices=get_args(VisionPrecision))
    parser.add_argument("--language", choices=get_args(LanguagePrecision))
    parser.add_argument("--kv", choices=get_args(CachePrecision))
    parser.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--tiles", type=int, metavar="N", help="thumbnail included")
    parser.add_argument("--prompt", type=int, default=100, metavar="N", help="tokens of text")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer")
    parser.add_argument("--arithmetic", type=float, metavar="SHARE", help="of the peak rate")
    parser.add_argument("--bandwidth", type=float, metavar="SHARE", help="of the peak bandwidth")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Estimate and print; returns the exit status: 0 also where it does not fit.

    Raises:
        UsageError: unknown target or mode, lengths that do not go together.
        CheckpointError, BundleError: the model cannot be read.
    """
    model, as_json = arguments.model, arguments.json
    if Path(model).is_file():
        report: dict[str, Any] = check_result(Path(model))
        print(json.dumps(report, indent=1) if as_json else "\n".join(_render_check(report)))
        return 0
    if arguments.target is None:
        known = ", ".join(item.name for item in TARGETS)
        raise UsageError(f"--target is missing; known: {known}")
    wish = filled(Wish, arguments)
    spec, request = resolve(model, wish)
    target = get_target(arguments.target)
    report = estimate(spec, request, target, arguments.power, _efficiency(wish))
    print(json.dumps(report, indent=1) if as_json else "\n".join(_render(report)))
    return 0


def resolve(model: str, wish: Wish) -> tuple[ModelSpec, Request]:
    """The spec of a model and what is asked of it; a bundle's own precisions by default."""
    path = Path(model)
    vision, language, kv = wish.vision, wish.language, wish.kv
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        spec = manifest.spec
        vision, language = vision or manifest.vision, language or manifest.language
        kv = kv or manifest.kv
    elif (name := ALIASES.get(model.lower(), model.lower())) in CONFIGS:
        spec = parse_config(CONFIGS[name])
    else:
        spec = _read_config(path)
    if spec.language.experts is not None:
        raise UsageError(
            "an estimate counts every weight as read for every token; of a decoder with experts a"
            " token reads a few: measure it instead"
        )
    tiles = wish.tiles
    if tiles is None:
        tiles = spec.tiling.max_tiles + (spec.tiling.thumbnail and spec.tiling.max_tiles > 1)
    request = Request(
        vision or "fp16", language or "fp16", kv or "fp16", tiles, wish.prompt, 0, wish.block
    )
    room = min(request.prompt_tokens(spec) + ANSWER, spec.language.max_context)
    return spec, Request(**{**vars(request), "context": wish.context or room})


def estimate(
    spec: ModelSpec,
    request: Request,
    target: Target,
    power: str | None,
    efficiency: Efficiency | None = None,
) -> dict[str, Any]:
    """Memory by part, whether it fits, what would make it fit, and predicted speed."""
    mode = target.mode(power)
    memory = memory_bytes(spec, request, shared=target.shared)
    total = sum(memory.values())
    fits = total <= target.usable_bytes
    device = Device.of_target(target, mode, request, efficiency)
    speed = predict(
        weights_of(spec, request),
        device,
        tiles=request.tiles,
        prompt_tokens=request.prompt_tokens(spec),
    )
    return {
        "target": target.name,
        "title": target.title,
        "mode": asdict(mode),
        "rates": {d: target.rate(d, mode) for d in ("float16", "int8")},
        "int8_published": "int8" in target.operations,
        "request": asdict(request),
        "memory_bytes": memory,
        "total_bytes": total,
        "usable_bytes": target.usable_bytes,
        "fits": fits,
        "remedies": [] if fits else _remedies(spec, request, target),
        "larger_targets": [] if fits else _larger(spec, request),
        "efficiency": asdict(device.efficiency),
        "speed": _speed_dict(speed, request),
        "published_error": _published(target),
        "sources": list(target.sources),
    }


def check_result(path: Path) -> dict[str, Any]:
    """Predictions for the machine a result was measured on, beside what it measured.

    Raises:
        UsageError: not a latency result.
    """
    result = read_result(path)
    ceilings = Ceilings(**result["ceilings"])
    rows = [row for model in result["models"] for row in _check_model(model, ceilings)]
    sizes = {
        phase: [abs(row["error"]) for row in rows if row["phase"] == phase] for phase in PHASES
    }
    return {
        "result": str(path),
        "rows": rows,
        "error": {
            phase: {"median": median(values), "worst": max(values)}
            for phase, values in sizes.items()
            if values
        },
        "notes": result["notes"],
    }


def _check_model(model: Mapping[str, Any], ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    weights = Weights.from_dict(model)
    device = Device.of_ceilings(ceilings, weights)
    for point in model["points"]:
        speed = predict(weights, device, tiles=point["tiles"], prompt_tokens=point["prompt_tokens"])
        predicted = {"vision": speed.vision_s, "prefill": speed.prefill_s, "itl": speed.token_s}
        for phase in (phase for phase in PHASES if phase in point["phases"]):
            measured = point["phases"][phase]["median"]
            yield {
                "model": model["name"],
                "tiles": point["tiles"],
                "prompt_tokens": point["prompt_tokens"],
                "phase": phase,
                "measured_s": measured,
                "predicted_s": predicted[phase],
                "error": predicted[phase] / measured - 1,
            }


def _read_config(path: Path) -> ModelSpec:
    """A checkpoint's spec from its config.json alone: no weight is needed."""
    try:
        config = read_object(path / "config.json")
    except (OSError, JsonError) as error:
        raise CheckpointError(
            f"{named(path)} is no bundle and no checkpoint ({reason(error)}); known without files:"
            f" {', '.join((*ALIASES, *CONFIGS))}"
        ) from error
    return parse_config(config)


def _efficiency(wish: Wish) -> Efficiency | None:
    if wish.arithmetic is None and wish.bandwidth is None:
        return None
    if wish.arithmetic is None or wish.bandwidth is None:
        raise UsageError("--arithmetic and --bandwidth go together")
    for option, share in (("--arithmetic", wish.arithmetic), ("--bandwidth", wish.bandwidth)):
        if not 0 < share <= 1:
            raise UsageError(f"{option} is {quoted(share)}, a share of the peak lies in (0, 1]")
    return Efficiency(wish.arithmetic, wish.bandwidth)


def _remedies(spec: ModelSpec, request: Request, target: Target) -> list[dict[str, Any]]:
    found = remedies(spec, request, target.usable_bytes, shared=target.shared)
    return [asdict(remedy) for remedy in found]


def _larger(spec: ModelSpec, request: Request) -> list[str]:
    """Targets that hold the request as it is."""
    return [
        target.name
        for target in TARGETS
        if sum(memory_bytes(spec, request, shared=target.shared).values()) <= target.usable_bytes
    ]


def _speed_dict(speed: Speed, request: Request) -> dict[str, float]:
    tile = speed.vision_s / request.tiles if request.tiles else 0.0
    return {
        "vision_tile_s": tile,
        "vision_s": speed.vision_s,
        "prefill_s": speed.prefill_s,
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "ttft_s": speed.ttft_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "prompt_tokens": speed.prompt_tokens,
    }


def _published(target: Target) -> dict[str, Any]:
    """Return the error against published figures: of this target, else of all."""
    errors = {}
    for phase in ("prefill", "decode"):
        own = published_error(phase, target.name)
        if (found := own or published_error(phase)) is not None:
            errors[phase] = asdict(found) | {"of": target.name if own else "all targets"}
    return errors


def _render(report: Mapping[str, Any]) -> Iterator[str]:
    mode: PowerMode = PowerMode(**report["mode"])
    rates, request, speed = report["rates"], report["request"], report["speed"]
    yield (
        f"{report['title']}, mode {mode.name}: {mode.sm_count} SMs at {mode.clock / 1e9:.2f} GHz,"
        f" {mode.bandwidth / 1e9:.0f} GB/s, dense float16 {rates['float16'] / 1e12:.0f} TFLOP/s,"
        + (
            f" int8 {rates['int8'] / 1e12:.0f} TOP/s"
            if report["int8_published"]
            else " int8 not published: taken as float16"
        )
    )
    yield (
        f"vision {request['vision']}, language {request['language']} block {request['block']},"
        f" KV {request['kv']}; {request['tiles']} tiles, {request['text_tokens']} tokens of text,"
        f" context {request['context']}"
    )
    yield from _render_memory(report)
    share = report["efficiency"]
    yield (
        f"speed, at {share['arithmetic']:.0%} of the arithmetic and {share['memory']:.0%} of the"
        " bandwidth (an estimate: nothing was run)"
    )
    if request["tiles"]:
        yield f"  vision               {speed['vision_tile_s'] * 1e3:10.1f} ms per tile"
    yield f"  prefill              {speed['prefill_tokens_per_s']:10.0f} tok/s"
    yield f"  first token          {speed['ttft_s']:10.2f} s ({speed['prompt_tokens']} tokens)"
    yield f"  decode               {speed['decode_tokens_per_s']:10.1f} tok/s"
    for phase, error in report["published_error"].items():
        yield (
            f"error on {error['count']} published {phase} figures of {error['of']}:"
            f" median {error['median']:.0%}, worst {error['worst']:.0%}"
        )
    yield from (f"source: {source}" for source in report["sources"])


def _render_memory(report: Mapping[str, Any]) -> Iterator[str]:
    yield "memory"
    for name, size in report["memory_bytes"].items():
        yield f"  {name:20} {size / GIB:10.2f} GiB"
    total, usable = report["total_bytes"], report["usable_bytes"]
    yield f"  {'total':20} {total / GIB:10.2f} GiB of {usable / GIB:.2f} usable"
    if report["fits"]:
        yield f"fits: yes, {(usable - total) / GIB:.2f} GiB to spare"
        return
    yield f"fits: no, {(total - usable) / GIB:.2f} GiB too much"
    for remedy in report["remedies"]:
        yield f"  would fit: {remedy['text']} ({remedy['total'] / GIB:.2f} GiB)"
    if not report["remedies"]:
        yield "  no precision and no number of tiles makes it fit"
    if report["larger_targets"]:
        yield f"  holds it as it is: {', '.join(report['larger_targets'])}"


def _render_check(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['result']}: predicted from its own ceilings"
    yield f"{'model':24} {'tiles':>5} {'prompt':>7} {'phase':8} {'measured':>11} {'predicted':>11}"
    for row in report["rows"]:
        yield (
            f"{row['model']:24} {row['tiles']:5d} {row['prompt_tokens']:7d} {row['phase']:8}"
            f" {row['measured_s'] * 1e3:8.2f} ms {row['predicted_s'] * 1e3:8.2f} ms"
            f" {row['error']:+7.0%}"
        )
    for phase, error in report["error"].items():
        yield f"error of {phase}: median {error['median']:.0%}, worst {error['worst']:.0%}"
    yield from (f"note: {note}" for note in report["notes"])
