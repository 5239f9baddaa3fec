"""The `export` command: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from internvl_edge.bundle.contract import (
    QUANTISATION_REPORT,
    CachePrecision,
    DialectName,
    LanguagePrecision,
    VisionPrecision,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--vision", choices=get_args(VisionPrecision), default="fp32")
    parser.add_argument("--language", choices=get_args(LanguagePrecision), default="fp32")
    parser.add_argument(
        "--for",
        dest="dialect",
        choices=get_args(DialectName),
        default="onnxruntime",
        help="who runs the graphs; tensorrt is 10.15 or later, tensorrt-portable 10.3 (JetPack 6)",
    )
    parser.add_argument("--kv", choices=get_args(CachePrecision), help="default: as computed")
    parser.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument(
        "--head", choices=("int8", "int4"), default="int8", help="of an int8 or int4 language model"
    )
    parser.add_argument("--asymmetric", action="store_true", help="store a zero point per block")
    parser.add_argument("--naive", action="store_true", help="round to nearest, for comparison")
    parser.add_argument(
        "--keep-fp16",
        action="append",
        default=[],
        metavar="PREFIX|N",
        help="tensors that stay at half precision, by the beginning of their name, or so many"
        " layers: those that lose most",
    )
    _add_calibration(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="folder or .jsonl of pictures (default: generated)",
    )
    parser.add_argument(
        "--calibration-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the float model runs for it",
    )
    parser.add_argument(
        "--sensitivity",
        action=argparse.BooleanOptionalAction,
        help="measure each layer's share in the logits' KL divergence, one layer at a time"
        " (default: where that takes minutes at most)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="KL",
        help="keep as many layers at half precision as bring the logits' KL divergence below this",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and print what quantising cost; returns the exit status."""
    from internvl_edge.export.bundle import export_bundle
    from internvl_edge.export.calibration.decisions import QuantOptions
    from internvl_edge.export.calibration.report import render_report
    from internvl_edge.export.progress import progress_bar

    with (
        progress_bar("export") as progress,
        progress_bar("calibrate", unit="layer") as unit_progress,
    ):
        path = export_bundle(
            arguments.checkpoint,
            arguments.output,
            vision=arguments.vision,
            language=arguments.language,
            kv=arguments.kv,
            dialect=arguments.dialect,
            options=QuantOptions(
                block=arguments.block,
                symmetric=not arguments.asymmetric,
                head_bits=4 if arguments.head == "int4" else 8,
                naive=arguments.naive,
                keep_fp16=tuple(word for word in arguments.keep_fp16 if not word.isdecimal()),
                keep_worst=sum(int(word) for word in arguments.keep_fp16 if word.isdecimal()),
            ),
            calibration=arguments.calibration,
            calibration_device=arguments.calibration_device,
            sensitivity=arguments.sensitivity,
            budget=arguments.budget,
            overwrite=arguments.overwrite,
            progress=progress,
            calibration_progress=unit_progress,
        )
    if (path / QUANTISATION_REPORT).exists():
        print(render_report(path))
    print(f"wrote {path}")
    return 0
