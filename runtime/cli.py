"""Command line: `internvl-edge demo | inspect | export | chat | bench`.

Every error a user can cause ends in one line on stderr and exit status 2; Ctrl-C in 130.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeAlias, get_args

from internvl_edge.runtime.contract import (
    MANIFEST,
    QUANTISATION_REPORT,
    CachePrecision,
    LanguagePrecision,
    VisionPrecision,
)
from internvl_edge.runtime.errors import DeviceError, ExportError, InternVLEdgeError, LimitError

#: What `ArgumentParser.add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except InternVLEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # its reader has gone
        return 0
    except OSError as error:
        _drop_output()
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


@contextmanager
def _export_installed() -> Iterator[None]:
    """Turn a missing package of the export extra into an error that names the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f"reading a checkpoint needs the package {error.name}:"
            " pip install 'internvl-edge[export]'"
        ) from error


def _drop_output() -> None:
    """Send what is left in the buffer nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: object) -> NoReturn:
    """Leave through `finally`, so that nothing half-written stays."""
    raise SystemExit(TERMINATED)


def _demo(arguments: argparse.Namespace) -> int:
    from internvl_edge.runtime.demo import run_demo

    right = run_demo(
        export=_export_quietly,
        device=arguments.device,
        threads=arguments.threads,
        repeat=arguments.repeat,
    )
    return 0 if right else 1


def _export_quietly(checkpoint: Path, bundle: Path) -> Path:
    with _export_installed():
        from internvl_edge.export.bundle import export_bundle
    return export_bundle(checkpoint, bundle)


def _inspect(arguments: argparse.Namespace) -> int:
    from internvl_edge.runtime.inspection import inspect_bundle, render

    path = Path(arguments.path)
    if (path / MANIFEST).exists():
        report = inspect_bundle(path)
    else:
        with _export_installed():
            from internvl_edge.export.inspection import inspect_checkpoint
        report = inspect_checkpoint(path)
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else render(report))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with _export_installed():
        from internvl_edge.export.bundle import export_bundle
        from internvl_edge.export.decisions import QuantOptions
        from internvl_edge.export.progress import progress_bar
        from internvl_edge.export.report import render_report
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
            options=QuantOptions(
                block=arguments.block,
                symmetric=not arguments.asymmetric,
                naive=arguments.naive,
                keep_fp16=tuple(word for word in arguments.keep_fp16 if not word.isdigit()),
                keep_worst=sum(int(word) for word in arguments.keep_fp16 if word.isdigit()),
            ),
            calibration=arguments.calibration,
            budget=arguments.budget,
            overwrite=arguments.overwrite,
            progress=progress,
            calibration_progress=unit_progress,
        )
    if (path / QUANTISATION_REPORT).exists():
        print(render_report(path))
    print(f"wrote {path}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from internvl_edge.runtime.terminal import run_chat

    return run_chat(arguments)


def _bench_kernels(arguments: argparse.Namespace) -> int:
    if arguments.threads is not None and arguments.threads < 1:
        raise LimitError(f"--threads is {arguments.threads}, it must be at least 1")
    if arguments.device == "cuda":
        from internvl_edge.bench.kernels_cuda import run_cuda_kernels
        from internvl_edge.kernels.build import BuildError
        from internvl_edge.kernels.device import CudaError

        try:
            return run_cuda_kernels(as_json=arguments.json)
        except (CudaError, BuildError) as error:
            raise DeviceError(str(error)) from error
    from internvl_edge.bench.kernels import run_kernels

    return run_kernels(threads=arguments.threads, as_json=arguments.json)


def _bench_precision(arguments: argparse.Namespace) -> int:
    with _export_installed():
        from internvl_edge.bench.precision import run_precision

    if arguments.threads is not None and arguments.threads < 1:
        raise LimitError(f"--threads is {arguments.threads}, it must be at least 1")
    return run_precision(threads=arguments.threads, as_json=arguments.json)


def _bench_accuracy(arguments: argparse.Namespace) -> int:
    with _export_installed():
        from internvl_edge.bench.accuracy import run_accuracy

    return run_accuracy(
        images=arguments.images,
        only=arguments.only,
        threads=arguments.threads,
        output=arguments.json,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, letting IMAGES of `chat` stand behind options as well (argparse before 3.12 fails)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "images")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.images += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl-edge", description="Edge inference runtime for InternVL 1.5 and its family"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run the bundled tiny model on a real picture")
    demo.add_argument("--repeat", type=int, default=1, help="runs to take the median of")
    _add_device(demo)
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="what a checkpoint or bundle is, and its sizes")
    inspect.add_argument("path", metavar="CHECKPOINT|BUNDLE")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    _add_export(commands)
    _add_chat(commands)
    _add_bench(commands)
    return parser


def _add_export(commands: Commands) -> None:
    export = commands.add_parser("export", help="Hugging Face checkpoint to bundle")
    export.add_argument("checkpoint", metavar="CHECKPOINT")
    export.add_argument("-o", "--output", required=True, metavar="BUNDLE")
    export.add_argument("--vision", choices=get_args(VisionPrecision), default="fp32")
    export.add_argument("--language", choices=get_args(LanguagePrecision), default="fp32")
    export.add_argument("--kv", choices=get_args(CachePrecision), help="default: as computed")
    export.add_argument("--block", type=int, choices=(32, 64, 128), default=128)
    export.add_argument("--asymmetric", action="store_true", help="store a zero point per block")
    export.add_argument("--naive", action="store_true", help="round to nearest, for comparison")
    export.add_argument(
        "--keep-fp16",
        action="append",
        default=[],
        metavar="PREFIX|N",
        help="tensors that stay at half precision, by the beginning of their name, or so many"
        " layers: those that lose most",
    )
    export.add_argument(
        "--calibration", metavar="DIR", help="folder or .jsonl of pictures (default: generated)"
    )
    export.add_argument(
        "--budget",
        type=float,
        metavar="KL",
        help="keep as many layers at half precision as bring the logits' KL divergence below this",
    )
    export.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    export.set_defaults(run=_export)


def _add_chat(commands: Commands) -> None:
    chat = commands.add_parser("chat", help="ask about images, once or in a conversation")
    chat.add_argument("bundle", metavar="BUNDLE")
    chat.add_argument("images", nargs="*", metavar="IMAGE")
    chat.add_argument("-p", "--prompt", help="ask this once; without it, a conversation")
    chat.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    chat.add_argument("--max-new-tokens", type=int, default=1024)
    chat.add_argument("--max-context", type=int, help="most tokens of prompt and answer")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--seed", type=int)
    chat.add_argument("--stop", action="append", default=[], help="text that ends the answer")
    chat.add_argument("--system", help="system message instead of the checkpoint's")
    chat.add_argument("--verify", choices=("hash", "size"), default="hash")
    chat.add_argument("--json", action="store_true", help="print replies as JSON lines")
    _add_device(chat)
    chat.set_defaults(run=_chat)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="measure beside a reference, correctness first")
    subjects = bench.add_subparsers(required=True, metavar="SUBJECT")
    kernels = subjects.add_parser("kernels", help="tiling and pixel shuffle against Pillow, NumPy")
    kernels.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    kernels.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    kernels.add_argument("--json", action="store_true")
    kernels.set_defaults(run=_bench_kernels)
    precision = subjects.add_parser("precision", help="integers against float, at true width")
    precision.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    precision.add_argument("--json", action="store_true")
    precision.set_defaults(run=_bench_precision)
    accuracy = subjects.add_parser("accuracy", help="exact match of tiny_ocr at every precision")
    accuracy.add_argument("--images", type=int, default=2000, help="held-out pictures")
    accuracy.add_argument("--only", action="append", default=[], help="one row of the table")
    accuracy.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    accuracy.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    accuracy.set_defaults(run=_bench_accuracy)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
