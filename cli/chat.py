"""The `chat` command: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import os

from internvl_edge.bundle.errors import PromptError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.cli.conversation import Asking, Conversation
from internvl_edge.cli.history import History, history_path
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.devices import EngineBuilder
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.options import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGE")
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
    parser.add_argument("--messages", metavar="FILE", help="go on with what /save wrote")
    parser.add_argument(
        "--drop-oldest", action="store_true", help="leave the oldest turns out of a full prompt"
    )
    parser.add_argument(
        "--control-tokens",
        action="store_true",
        help="let text that spells a control token have it, as the reference does",
    )
    parser.add_argument("--json", action="store_true", help="print replies as JSON lines")
    parser.add_argument(
        "--no-history", action="store_true", help="neither recall nor keep lines that are typed"
    )
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

    def begin(messages: str | None = None) -> Chat:
        return model.chat(
            system_message=arguments.system,
            max_tiles=arguments.max_tiles,
            messages=messages,
            control_tokens=arguments.control_tokens,
            drop_oldest=arguments.drop_oldest,
        )

    asking = Asking(
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
        upright=arguments.upright,
        json=arguments.json,
    )
    conversation = Conversation(
        begin,
        begin(arguments.messages),
        asking,
        lambda picture: len(model.tile(picture, arguments.max_tiles)),
        History(None if arguments.no_history else history_path(os.environ)),
    )
    conversation.show(arguments.images)
    if arguments.prompt is not None:
        conversation.ask(arguments.prompt)
    else:
        conversation.hold()
    return 0


def _builder() -> EngineBuilder:
    with extra_installed("export"):
        from internvl_edge.export.tensorrt.engines import build_for_machine
    return build_for_machine
