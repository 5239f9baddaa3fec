"""The `demo` command: the bundled tiny model, from checkpoint to two answered questions."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.bundle.contract import MANIFEST
from internvl_edge.bundle.errors import CheckpointError, OutputError
from internvl_edge.bundle.extras import example_room, room
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.cli.conversation import summary
from internvl_edge.kernels.build import locked, user_cache
from internvl_edge.runtime.decoding.request import Reply
from internvl_edge.runtime.images.decode import load_image
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.options import add_device, at_least

Export = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Turn:
    """A question about the demo picture and what is written there."""

    question: str
    answer: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--repeat",
        type=at_least(1, "--repeat"),
        default=1,
        help="conversations to hold and take the median of",
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export on first use, ask, stream, report; returns 0 when every answer is right, else 1."""
    room = example_room()
    picture, turns = _questions(room)
    export = _exporter()
    bundle = _ready(room) if export is None else _bundle(room / "checkpoint", export)
    started = time.perf_counter()
    # Nothing is kept between conversations: every repetition does the whole work.
    model = InternVL.load(bundle, device=arguments.device, threads=arguments.threads, reuse_bytes=0)
    seconds = time.perf_counter() - started
    runs_on = model.engine.backend.description.partition(" (auto")[0]  # why was said already
    _say("load", f"{seconds:.2f} s; {runs_on}")
    image = load_image(picture)
    tiles = model.tile(picture)
    rows = len(tiles) * model.spec.vision.tokens_per_tile
    _say(
        "image",
        f"{picture.name}, {image.width} x {image.height} px -> {len(tiles)} tiles of"
        f" {tiles.shape[1]} px, thumbnail included -> {rows} image tokens",
    )
    replies: list[list[Reply]] = []
    right = True
    for number in range(arguments.repeat):
        if arguments.repeat > 1:
            print(f"\nrun {number + 1} of {arguments.repeat}")
        run_replies, run_right = _conversation(model, picture, turns)
        replies.append(run_replies)
        right &= run_right
    if arguments.repeat > 1:
        _print_medians(replies)
    print("\nall answers are right" if right else "\nNOT all answers are right")
    print(f"ask more:\n  internvl-edge chat {shlex.quote(str(bundle))} {shlex.quote(str(picture))}")
    return 0 if right else 1


def _exporter() -> Export | None:
    """Import what exports; None where the extra's packages are not installed."""
    try:
        from internvl_edge.export.bundle import export_bundle
    except ModuleNotFoundError:
        return None
    return export_bundle


def _ready(room: Path) -> Path:
    """The bundle that ships with the example, for who has installed the runtime alone."""
    _say("bundle", "tiny_ocr, INT8 + INT4, as it ships: exporting needs internvl-edge[export]")
    return room / "bundle"


def _conversation(model: InternVL, picture: Path, turns: list[Turn]) -> tuple[list[Reply], bool]:
    chat = model.chat()
    replies = []
    right = True
    for number, turn in enumerate(turns):
        print(f"\n> {turn.question}")
        stream = chat.stream(turn.question, [picture] if number == 0 else [], max_new_tokens=64)
        for piece in stream:
            print(piece, end="", flush=True)
        reply = stream.close()
        correct = reply.text == turn.answer
        right &= correct
        print("   (right)" if correct else f"   (WRONG: the picture says {turn.answer!r})")
        print(f"  {summary(reply.timings, len(reply.token_ids))}")
        replies.append(reply)
    return replies, right


def _print_medians(runs: list[list[Reply]]) -> None:
    print(f"\nmedian of {len(runs)} runs (lowest to highest)")
    for number, replies in enumerate(zip(*runs, strict=True), start=1):
        ttft = [reply.timings.ttft_s * 1e3 for reply in replies]
        rate = [reply.timings.decode_tokens_per_s for reply in replies]
        print(
            f"  turn {number}: TTFT {statistics.median(ttft):.2f} ms"
            f" ({min(ttft):.2f} to {max(ttft):.2f}), decode {statistics.median(rate):.0f} tok/s"
            f" ({min(rate):.0f} to {max(rate):.0f})"
        )


def _bundle(checkpoint: Path, export: Export) -> Path:
    """The exported model in the user's cache, made when this checkpoint is met first."""
    try:
        size = (checkpoint / "model.safetensors").stat().st_size / 1e6
        bundle = user_cache() / f"tiny-ocr-{_bundle_key(checkpoint)}"
    except OSError as error:
        raise CheckpointError(f"the demo checkpoint is incomplete: {reason(error)}") from error
    _say("checkpoint", f"tiny_ocr, {size:.1f} MB of weights: InternViT (RMSNorm) + InternLM2 (GQA)")
    if not (bundle / MANIFEST).exists():
        try:
            bundle.parent.mkdir(parents=True, exist_ok=True)
            # Of two first runs one exports, the other waits.
            with locked(bundle.with_name(f"{bundle.name}.lock")):
                _export_once(checkpoint, bundle, export)
        except OSError as error:
            raise OutputError(
                f"cannot write {named(bundle)}: {reason(error)}; set XDG_CACHE_HOME to a"
                " directory that can be written"
            ) from error
    else:
        _say("export", f"already done: {bundle}")
    return bundle


def _export_once(checkpoint: Path, bundle: Path, export: Export) -> None:
    if (bundle / MANIFEST).exists():
        _say("export", f"done by another run meanwhile: {bundle}")
        return
    started = time.perf_counter()
    export(checkpoint, bundle)
    _say("export", f"{time.perf_counter() - started:.2f} s -> {bundle}")


def _bundle_key(checkpoint: Path) -> str:
    """Name what the bundle is made of: every file of the checkpoint, and what exports them."""
    digest = hashlib.sha256()
    for name in ("bundle", "export", "runtime"):
        folder = room(name)
        if folder is not None:
            _add_files(digest, sorted(folder.rglob("*.py")))
    _add_files(digest, sorted(path for path in checkpoint.iterdir() if path.is_file()))
    return digest.hexdigest()[:32]


def _add_files(digest: hashlib._Hash, paths: Sequence[Path]) -> None:
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)


def _questions(room: Path) -> tuple[Path, list[Turn]]:
    script = json.loads((room / "receipt.json").read_text(encoding="utf-8"))
    turns = [Turn(turn["question"], turn["answer"]) for turn in script["turns"]]
    return room / script["image"], turns


def _say(step: str, text: str) -> None:
    print(f"{step:>10}  {text}", flush=True)
