"""Command line: `internvl-edge demo | inspect | doctor | export | prepare | build | chat | bench`.

Every error a user can cause ends in one line on stderr and exit status 2; Ctrl-C in 130.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO, get_args

from internvl_edge.bundle.contract import (
    MANIFEST,
    QUANTISATION_REPORT,
    CachePrecision,
    DialectName,
    LanguagePrecision,
    VisionPrecision,
)
from internvl_edge.bundle.disk import full_disk, is_full
from internvl_edge.bundle.errors import InternVLEdgeError, InternVLEdgeWarning, LimitError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.bundle.quoting import LONGEST, named, reason
from internvl_edge.cli.bench import add_bench
from internvl_edge.cli.build import add_build
from internvl_edge.cli.common import Commands, add_device

USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with _warnings_in_a_line():
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
        place = f"{named(error.filename)}: " if isinstance(error.filename, str) else ""
        full = is_full(error) and error.filename is not None  # else it was the output
        text = full_disk(error, Path()) if full else f"{place}{reason(error)}"
        print(f"error: {text}", file=sys.stderr)
        return USAGE_ERROR


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print our own warnings on stderr like errors, without the place in the code."""
    shown_before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, InternVLEdgeWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            shown_before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _drop_output() -> None:
    """Send what is left in the buffer nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: object) -> NoReturn:
    """Leave through `finally`, so that nothing half-written stays."""
    raise SystemExit(TERMINATED)


def _demo(arguments: argparse.Namespace) -> int:
    from internvl_edge.cli.demo import run_demo

    right = run_demo(
        export=_export_quietly,
        device=arguments.device,
        threads=arguments.threads,
        repeat=arguments.repeat,
    )
    return 0 if right else 1


def _export_quietly(checkpoint: Path, bundle: Path) -> Path:
    with extra_installed():
        from internvl_edge.export.bundle import export_bundle
    return export_bundle(checkpoint, bundle)


def _inspect(arguments: argparse.Namespace) -> int:
    from internvl_edge.runtime.inspection import inspect_bundle, render

    path = Path(arguments.path)
    if arguments.check:
        return _check(arguments, path)
    if arguments.reference is not None or arguments.all_gpus:
        raise LimitError("--reference and --all-gpus go with inspect --check; add --check")
    if (path / MANIFEST).exists():
        report = inspect_bundle(path)
    else:
        with extra_installed():
            from internvl_edge.export.inspection import inspect_checkpoint
        report = inspect_checkpoint(path)
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else render(report))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from internvl_edge.runtime.doctor import examine
    from internvl_edge.runtime.inspection import render

    report = examine()
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else render(report))
    return 0


def _check(arguments: argparse.Namespace, path: Path) -> int:
    """Exit status 1: the bundle was checked and does not pass."""
    with extra_installed():
        from internvl_edge.export.tensorrt.gate import check_bundle, render_gate
        from internvl_edge.export.tensorrt.rtx import CAPABILITIES

    report = check_bundle(
        path,
        reference=arguments.reference,
        capabilities=CAPABILITIES if arguments.all_gpus else CAPABILITIES[:1],
    )
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else render_gate(report))
    return 1 if report.failures else 0


def _export(arguments: argparse.Namespace) -> int:
    with extra_installed():
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
                keep_fp16=tuple(word for word in arguments.keep_fp16 if not word.isdigit()),
                keep_worst=sum(int(word) for word in arguments.keep_fp16 if word.isdigit()),
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


def _prepare(arguments: argparse.Namespace) -> int:
    with extra_installed():
        from internvl_edge.export.prepare.prepare import prepare_bundle
        from internvl_edge.export.progress import progress_bar
    with progress_bar("prepare") as progress:
        path = prepare_bundle(arguments.bundle, overwrite=arguments.overwrite, progress=progress)
    print(f"prepared {path}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from internvl_edge.cli.terminal import run_chat

    return run_chat(arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, letting a list such as IMAGES stand behind options (argparse before 3.12 fails).

    A command says with the default `trailing` which of its lists that is.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    trailing = getattr(arguments, "trailing", None)
    if rest and (trailing is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if trailing is not None:
        getattr(arguments, trailing).extend(rest)
    return arguments


class _Parser(argparse.ArgumentParser):
    """Commands inherit it."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message, which may hold an argument of any length."""
        super().error(message if len(message) <= 3 * LONGEST else f"{message[: 3 * LONGEST]}...")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="internvl-edge", description="Edge inference runtime for InternVL 1.5 and its family"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run the bundled tiny model on a real picture")
    demo.add_argument("--repeat", type=int, default=1, help="runs to take the median of")
    add_device(demo)
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="what a checkpoint or bundle is, and its sizes")
    inspect.add_argument("path", metavar="CHECKPOINT|BUNDLE")
    inspect.add_argument("--json", action="store_true")
    inspect.add_argument(
        "--check",
        action="store_true",
        help="of a bundle for TensorRT: run it on the CPU, build its engines without a GPU",
    )
    inspect.add_argument(
        "--reference", type=Path, metavar="BUNDLE", help="the same, exported --for onnxruntime"
    )
    inspect.add_argument("--all-gpus", action="store_true", help="build for every GPU generation")
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser(
        "doctor", help="what this machine runs with, and what optional parts lack: for bug reports"
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    _add_export(commands)

    prepare = commands.add_parser(
        "prepare", help="store a bundle's weights as this CPU's kernels want them: mapped at load"
    )
    prepare.add_argument("bundle", metavar="BUNDLE")
    prepare.add_argument("--overwrite", action="store_true", help="write it again")
    prepare.set_defaults(run=_prepare)

    add_build(commands)
    _add_chat(commands)
    add_bench(commands)
    return parser


def _add_export(commands: Commands) -> None:
    export = commands.add_parser("export", help="Hugging Face checkpoint to bundle")
    export.add_argument("checkpoint", metavar="CHECKPOINT")
    export.add_argument("-o", "--output", required=True, metavar="BUNDLE")
    export.add_argument("--vision", choices=get_args(VisionPrecision), default="fp32")
    export.add_argument("--language", choices=get_args(LanguagePrecision), default="fp32")
    export.add_argument(
        "--for",
        dest="dialect",
        choices=get_args(DialectName),
        default="onnxruntime",
        help="who runs the graphs; tensorrt is 10.15 or later, tensorrt-portable 10.3 (JetPack 6)",
    )
    export.add_argument("--kv", choices=get_args(CachePrecision), help="default: as computed")
    export.add_argument("--block", type=int, choices=(32, 64, 128, 256), default=128)
    export.add_argument(
        "--head", choices=("int8", "int4"), default="int8", help="of an int8 or int4 language model"
    )
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
        "--calibration-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the float model runs for it",
    )
    export.add_argument(
        "--sensitivity",
        action=argparse.BooleanOptionalAction,
        help="measure each layer's share in the logits' KL divergence, one layer at a time"
        " (default: where that takes minutes at most)",
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
    chat.add_argument(
        "--auto-build", action="store_true", help="build TensorRT engines where none fit this GPU"
    )
    chat.add_argument("--json", action="store_true", help="print replies as JSON lines")
    chat.add_argument(
        "--low-memory", action="store_true", help="hold one of the two graphs at a time (CPU)"
    )
    chat.add_argument(
        "--image-folder", metavar="DIR", help="keep encoded images there for the next time"
    )
    add_device(chat)
    chat.set_defaults(run=_chat, trailing="images")
