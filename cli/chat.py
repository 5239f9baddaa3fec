"""The `chat` command: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys

from internvl_edge.bundle.errors import InternVLEdgeError, PromptError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.streams import print_json
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.request import Reply, Timings
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.devices import EngineBuilder
from internvl_edge.runtime.images.sources import Picture
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.options import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("-p", "--prompt", help="ask this once; without it, a conversation")
    parser.add_argument(
        "--upright", action="store_true", help="turn images as their EXIF orientation says"
    )
    parser.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-context", type=int, help="most tokens of prompt and answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer")
    parser.add_argument("--system", help="system message instead of the checkpoint's")
    parser.add_argument("--verify", choices=("hash", "size"), default="hash")
    parser.add_argument(
        "--auto-build", action="store_true", help="build TensorRT engines where none fit this GPU"
    )
    parser.add_argument("--json", action="store_true", help="print replies as JSON lines")
    parser.add_argument(
        "--low-memory", action="store_true", help="hold one of the two graphs at a time (CPU)"
    )
    parser.add_argument(
        "--image-folder", metavar="DIR", help="keep encoded images there for the next time"
    )
    add_device(parser)
    parser.set_defaults(trailing="images")


def run(arguments: argparse.Namespace) -> int:
    """Ask once, or hold a conversation; returns the exit status."""
    sampling = Sampling(
        temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed
    )
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise PromptError("the prompt is empty; ask something about the image or the text")
    model = InternVL.load(
        arguments.bundle,
        device=arguments.device,
        threads=arguments.threads,
        max_context=arguments.max_context,
        verify=arguments.verify,
        low_memory=arguments.low_memory,
        build_engines=_builder() if arguments.auto_build else None,
        image_folder=arguments.image_folder,
    )
    chat = model.chat(system_message=arguments.system, max_tiles=arguments.max_tiles)
    images = [Picture(path, upright=arguments.upright) for path in arguments.images]
    if arguments.prompt is not None:
        _turn(chat, arguments.prompt, images, arguments, sampling)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the images; Ctrl-C ends an answer, Ctrl-D the conversation.")
    while (prompt := _read_prompt(interactive)) is not None:
        if not prompt.strip():
            continue
        try:
            _turn(chat, prompt, images, arguments, sampling)
            images = []
        except InternVLEdgeError as error:
            if not interactive:
                raise
            # The conversation goes on as it was.
            print(f"error: {error.told(flags=True)}", file=sys.stderr)
    return 0


def summary(timings: Timings, tokens: int) -> str:
    """One line about a reply: what was computed, how fast."""
    reused = f", {timings.cached_tokens} from the cache" if timings.cached_tokens else ""
    return (
        f"{timings.prompt_tokens} prompt tokens{reused}, {timings.tiles} tiles encoded;"
        f" TTFT {timings.ttft_s * 1e3:.1f} ms (vision {timings.vision_s * 1e3:.1f},"
        f" prefill {timings.prefill_s * 1e3:.1f}); {tokens} tokens,"
        f" decode {timings.decode_tokens_per_s:.0f} tok/s"
    )


def _builder() -> EngineBuilder:
    with extra_installed("export"):
        from internvl_edge.export.tensorrt.engines import build_for_machine
    return build_for_machine


def _turn(
    chat: Chat,
    prompt: str,
    images: list[Picture],
    arguments: argparse.Namespace,
    sampling: Sampling,
) -> None:
    stream = chat.stream(
        prompt,
        images,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
    )
    if arguments.json:
        print_json(_as_dict(stream.finish()))
        return
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    reply = stream.close()
    print()
    print(
        f"[{reply.finish_reason}] {summary(reply.timings, len(reply.token_ids))}", file=sys.stderr
    )


def _as_dict(reply: Reply) -> dict[str, object]:
    timings = reply.timings
    return {
        "text": reply.text,
        "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason,
        "timings": {
            **vars(timings),
            "ttft_s": timings.ttft_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    }


def _read_prompt(interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt is not text in {error.encoding}: {error.reason}") from error
