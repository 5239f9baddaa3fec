"""Command line: `internvl-edge demo | inspect | export | chat`.

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
from typing import NoReturn

from internvl_edge.runtime.contract import MANIFEST
from internvl_edge.runtime.errors import ExportError, InternVLEdgeError

USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
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
        # The reader of our output has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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
        from internvl_edge.export.progress import progress_bar
    path = export_bundle(
        arguments.checkpoint,
        arguments.output,
        vision=arguments.vision,
        language=arguments.language,
        overwrite=arguments.overwrite,
        progress=progress_bar,
    )
    print(f"wrote {path}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from internvl_edge.runtime.terminal import run_chat

    return run_chat(arguments)


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

    export = commands.add_parser("export", help="Hugging Face checkpoint to bundle")
    export.add_argument("checkpoint", metavar="CHECKPOINT")
    export.add_argument("-o", "--output", required=True, metavar="BUNDLE")
    for part in ("vision", "language"):
        export.add_argument(f"--{part}", choices=("fp32", "fp16"), default="fp32")
    export.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    export.set_defaults(run=_export)

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
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
