"""The `chat` command: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from internvl_edge.bundle.errors import ImageError, PromptError
from internvl_edge.bundle.extras import extra_installed
from internvl_edge.bundle.manifest import Verify
from internvl_edge.cli.conversation import Asking, Conversation
from internvl_edge.cli.history import History, history_path
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.devices import EngineBuilder
from internvl_edge.runtime.images.sources import encoded_image
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.options import ArgumentGroup, add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="folder that internvl-edge export wrote"
    )
    parser.add_argument(
        "images", nargs="*", default=[], metavar="IMAGE", help="pictures of the first question"
    )
    parser.add_argument("-p", "--prompt", help="ask this once; without it, a conversation")
    parser.add_argument("--json", action="store_true", help="print replies as JSON lines")
    _add_shown(parser.add_argument_group("what the model is shown"))
    _add_answers(parser.add_argument_group("answers"))
    _add_conversation(parser.add_argument_group("conversation"))
    machine = parser.add_argument_group("machine")
    add_device(machine)
    machine.add_argument("--max-context", type=int, help="most tokens of prompt and answer")
    machine.add_argument(
        "--low-memory", action="store_true", help="hold one of the two graphs at a time (CPU)"
    )
    machine.add_argument(
        "--verify",
        choices=get_args(Verify),
        default="once",
        help="check the content of the bundle's files: of large ones again only when they have"
        " changed (once), of all (hash), or of none, but their sizes (size)",
    )
    machine.add_argument(
        "--auto-build", action="store_true", help="build TensorRT engines where none fit this GPU"
    )
    parser.set_defaults(trailing="images")


def _add_shown(group: ArgumentGroup) -> None:
    group.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    group.add_argument(
        "--frame", type=int, help="of an animation, or page of a TIFF or PDF, from 0"
    )
    group.add_argument(
        "--upright", action="store_true", help="turn images as their EXIF orientation says"
    )
    group.add_argument(
        "--image-folder",
        type=Path,
        metavar="DIR",
        help="keep encoded images there for the next time",
    )
    group.add_argument("--system", help="system message instead of the checkpoint's")
    group.add_argument(
        "--thinking", action="store_true", help="ask for reasoning first (InternVL 3.5)"
    )
    group.add_argument(
        "--control-tokens",
        action="store_true",
        help="let text that spells a control token have it, as the reference does",
    )


def _add_answers(group: ArgumentGroup) -> None:
    group.add_argument(
        "--max-new-tokens", type=int, help="an answer ends there (default: the model's own or 1024)"
    )
    group.add_argument(
        "--temperature", type=float, help="0 is greedy (default: the model's own, else 0)"
    )
    group.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this sum")
    group.add_argument("--seed", type=int, help="draws the same tokens again")
    group.add_argument(
        "--speculate",
        type=int,
        default=Sampling.speculate,
        metavar="N",
        help="most tokens guessed ahead from what is repeated; 0 none (default: %(default)s)",
    )
    group.add_argument("--stop", action="append", default=[], help="text that ends the answer")


def _add_conversation(group: ArgumentGroup) -> None:
    group.add_argument("--messages", type=Path, metavar="FILE", help="go on with what /save wrote")
    group.add_argument(
        "--drop-oldest", action="store_true", help="leave the oldest turns out of a full prompt"
    )
    group.add_argument(
        "--no-history", action="store_true", help="neither recall nor keep lines that are typed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask once, or hold a conversation; returns the exit status."""
    sampling = {
        name: getattr(arguments, name) for name in ("temperature", "top_p", "seed", "speculate")
    }
    Sampling.of(sampling)  # what is wrong with it is said before minutes of loading
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise PromptError("the prompt is empty; ask something about the image or the text")
    for image in arguments.images:
        _check(image)
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

    def begin(messages: Path | None = None) -> Chat:
        return model.chat(
            system_message=arguments.system,
            max_tiles=arguments.max_tiles,
            messages=messages,
            control_tokens=arguments.control_tokens,
            drop_oldest=arguments.drop_oldest,
            thinking=arguments.thinking,
        )

    asking = Asking(
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=arguments.stop,
        frame=arguments.frame,
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


def _check(image: str) -> None:
    """Raise ImageError where there is no such picture, before minutes of loading."""
    try:
        encoded_image(image)
    except ImageError as error:
        asked = "; a question is asked with -p" if len(image.split()) > 1 else ""
        raise ImageError(f"{error}{asked}") from error


def _builder() -> EngineBuilder:
    with extra_installed("export"):
        from internvl_edge.export.tensorrt.engines import build_for_machine
    return build_for_machine
