"""The `chat` command: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys

from internvl_edge.bundle.errors import InternVLEdgeError, PromptError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.request import Reply, Timings
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.devices import EngineBuilder
from internvl_edge.runtime.model import InternVL


def run_chat(arguments: argparse.Namespace) -> int:
    """Run `internvl-edge chat`; returns the exit status."""
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
    images = list(arguments.images)
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
            print(f"error: {error}", file=sys.stderr)  # the conversation goes on as it was
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
    with extra_installed():
        from internvl_edge.export.tensorrt.engines import build_for_machine
    return build_for_machine


def _turn(
    chat: Chat,
    prompt: str,
    images: list[str],
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
        print(json.dumps(_as_dict(stream.finish()), ensure_ascii=False), flush=True)
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
