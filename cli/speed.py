"""The `bench` commands about time and memory: latency, profile, estimate, compare, synthetic."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from internvl_edge.bundle.contract import CachePrecision, LanguagePrecision, VisionPrecision
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.common import (
    Commands,
    add_threads,
    check_threads,
)


def add_speed(subjects: Commands) -> None:
    """Add the commands to those of `bench`."""
    _add_latency(subjects)
    _add_profile(subjects)
    _add_estimate(subjects)
    _add_compare(subjects)
    _add_synthetic(subjects)
    _add_memory(subjects)
    _add_layerwise(subjects)


def _add_latency(subjects: Commands) -> None:
    latency = subjects.add_parser("latency", help="every phase of an answer, beside its limit")
    latency.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    latency.add_argument("--tiles", nargs="+", type=int, default=[1, 4, 13], metavar="N")
    latency.add_argument(
        "--prompt", nargs="+", type=int, default=[64], metavar="N", help="tokens of the question"
    )
    latency.add_argument("--new-tokens", nargs="+", type=int, default=[32], metavar="N")
    latency.add_argument(
        "--rounds", type=int, default=5, help="that count, each with the model loaded anew"
    )
    latency.add_argument("--repeat", type=int, default=3, help="measured runs of a point a round")
    latency.add_argument("--warmup", type=int, default=1, help="runs before them, not counted")
    add_threads(latency)
    latency.add_argument("--json", type=Path, metavar="FILE", help="store every sample there")
    latency.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    latency.add_argument("--png", type=Path, metavar="FILE", help="write the plots as a picture")
    latency.set_defaults(run=_latency)


def _latency(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    with extra_installed():
        from internvl_edge.bench.latency.run import run_latency

    return run_latency(
        arguments.bundles,
        tiles=arguments.tiles,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        runs=arguments.repeat,
        warmup=arguments.warmup,
        threads=arguments.threads,
        json_file=arguments.json,
        html_file=arguments.html,
        png_file=arguments.png,
    )


def _add_profile(subjects: Commands) -> None:
    profile = subjects.add_parser("profile", help="where the time goes, by block and operator")
    profile.add_argument("bundle", type=Path, metavar="BUNDLE")
    profile.add_argument("--tiles", type=int, default=1, metavar="N")
    profile.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens of a prefill")
    profile.add_argument("--repeat", type=int, default=3, help="measured runs of each phase")
    profile.add_argument("--top", type=int, default=8, metavar="N", help="lines of each list")
    add_threads(profile)
    profile.add_argument("--json", action="store_true")
    profile.set_defaults(run=_profile)


def _profile(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    with extra_installed():
        from internvl_edge.bench.latency.operators import run_profile

    return run_profile(
        arguments.bundle,
        tiles=arguments.tiles,
        tokens=arguments.prompt,
        runs=arguments.repeat,
        top=arguments.top,
        threads=arguments.threads,
        as_json=arguments.json,
    )


def _add_estimate(subjects: Commands) -> None:
    estimate = subjects.add_parser("estimate", help="memory and speed on a GPU not at hand")
    estimate.add_argument(
        "model",
        metavar="MODEL|RESULT",
        help="checkpoint, bundle, internvl-1.5; or a stored latency result, to predict it anew",
    )
    estimate.add_argument("--target", metavar="NAME", help="such as orin-agx-64, thor, h100")
    estimate.add_argument("--power", metavar="MODE", help="power mode (default: the fastest)")
    estimate.add_argument("--vision", choices=get_args(VisionPrecision))
    estimate.add_argument("--language", choices=get_args(LanguagePrecision))
    estimate.add_argument("--kv", choices=get_args(CachePrecision))
    estimate.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    estimate.add_argument("--tiles", type=int, metavar="N", help="thumbnail included")
    estimate.add_argument("--prompt", type=int, default=100, metavar="N", help="tokens of text")
    estimate.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer")
    estimate.add_argument("--arithmetic", type=float, metavar="SHARE", help="of the peak rate")
    estimate.add_argument("--bandwidth", type=float, metavar="SHARE", help="of the peak bandwidth")
    estimate.add_argument("--json", action="store_true")
    estimate.set_defaults(run=_estimate)


def _estimate(arguments: argparse.Namespace) -> int:
    with extra_installed("bench"):
        from internvl_edge.bench.estimate.run import Wish, run_estimate

    wish = Wish(
        vision=arguments.vision,
        language=arguments.language,
        kv=arguments.kv,
        tiles=arguments.tiles,
        text_tokens=arguments.prompt,
        context=arguments.context,
        block=arguments.block,
        arithmetic=arguments.arithmetic,
        memory=arguments.bandwidth,
    )
    return run_estimate(
        arguments.model,
        target=arguments.target,
        power=arguments.power,
        wish=wish,
        as_json=arguments.json,
    )


def _add_compare(subjects: Commands) -> None:
    compare = subjects.add_parser("compare", help="two latency results, and what is chance")
    compare.add_argument("before", type=Path, metavar="BEFORE")
    compare.add_argument("after", type=Path, metavar="AFTER")
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    with extra_installed("bench"):
        from internvl_edge.bench.latency.compare import run_compare

        return run_compare(arguments.before, arguments.after, as_json=arguments.json)


def _add_synthetic(subjects: Commands) -> None:
    synthetic = subjects.add_parser(
        "synthetic", help="export a released model's true shapes with drawn weights, measured"
    )
    synthetic.add_argument("model", metavar="MODEL", help="such as internvl-chat-v1-5")
    synthetic.add_argument("-o", "--output", required=True, type=Path, metavar="BUNDLE")
    synthetic.add_argument("--vision", choices=get_args(VisionPrecision), default="fp32")
    synthetic.add_argument("--language", choices=get_args(LanguagePrecision), default="fp32")
    synthetic.add_argument("--kv", choices=get_args(CachePrecision), help="default: as computed")
    synthetic.add_argument("--layers", type=int, metavar="N", help="keep N of each tower's")
    synthetic.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    synthetic.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")
    synthetic.set_defaults(run=_synthetic)


def _synthetic(arguments: argparse.Namespace) -> int:
    with extra_installed():
        from internvl_edge.bench.scale.run import run_synthetic

    return run_synthetic(
        arguments.model,
        arguments.output,
        vision=arguments.vision,
        language=arguments.language,
        kv=arguments.kv,
        layers=arguments.layers,
        overwrite=arguments.overwrite,
        json_file=arguments.json,
    )


def _add_memory(subjects: Commands) -> None:
    memory = subjects.add_parser("memory", help="planned beside measured memory, for one prompt")
    memory.add_argument("bundle", type=Path, metavar="BUNDLE")
    memory.add_argument("--tiles", type=int, default=13, metavar="N", help="thumbnail included")
    memory.add_argument("--new-tokens", type=int, default=16, metavar="N")
    memory.add_argument("--low-memory", action="store_true", help="one graph at a time")
    add_threads(memory)
    memory.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")
    memory.set_defaults(run=_memory)


def _memory(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    with extra_installed():
        from internvl_edge.bench.latency.memory import run_memory

    return run_memory(
        arguments.bundle,
        tiles=arguments.tiles,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        low_memory=arguments.low_memory,
        json_file=arguments.json,
    )


def _add_layerwise(subjects: Commands) -> None:
    layerwise = subjects.add_parser(
        "layerwise", help="the decoder beside transformers' layers in float32, one at a time"
    )
    layerwise.add_argument("bundle", type=Path, metavar="BUNDLE")
    layerwise.add_argument("--prompt", type=int, default=24, metavar="N", help="tokens")
    layerwise.add_argument("--new-tokens", type=int, default=16, metavar="N")
    add_threads(layerwise)
    layerwise.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")
    layerwise.set_defaults(run=_layerwise)


def _layerwise(arguments: argparse.Namespace) -> int:
    check_threads(arguments.threads)
    with extra_installed():
        from internvl_edge.bench.answers.layerwise import run_layerwise

    return run_layerwise(
        arguments.bundle,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        json_file=arguments.json,
    )
