"""Conversations as lists of messages, in the form that OpenAI's API gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from internvl_edge.bundle.errors import ImageError, PromptError
from internvl_edge.bundle.prompt import IMAGE_PLACEHOLDER
from internvl_edge.bundle.quoting import quoted
from internvl_edge.runtime.arguments import pictures, text_or_none
from internvl_edge.runtime.decoding.inputs import Inputs
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.sources import ImageLike, Images
from internvl_edge.runtime.stored import CutImage, read_image

#: `[{"role": "user", "content": "Hello"}, ...]`; see `read_messages`.
Messages: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Shown:
    """An image, and where it stands: `messages[2].content[0]`; "" beside a prompt."""

    place: str
    source: ImageLike | CutImage


@dataclass(frozen=True)
class Conversation:
    """What was said.

    Attributes:
        turns: questions, with an `<image>` for each picture, and answers; the last answer may be
            None: the one to be generated.
        pictures: in the order of their markers.
        system_message: None: the checkpoint's.
    """

    turns: list[tuple[str, str | None]]
    pictures: list[Shown]
    system_message: str | None

    def tile(self, inputs: Inputs, max_tiles: int | None) -> list[TiledImage]:
        """Cut the pictures.

        Raises:
            ImageError: one cannot be read; the message names its place.
            LimitError: `max_tiles` is no such number.
        """
        inputs.tiling(max_tiles)  # also where there is no picture
        return [_tiled(picture, inputs, max_tiles) for picture in self.pictures]

    def question(self) -> Conversation:
        """Return a conversation that ends with a question.

        Raises:
            PromptError: it ends with an answer.
        """
        if self.turns[-1:] and self.turns[-1][1] is None:
            return self
        raise PromptError("messages must end with a user message, the one to be answered")

    def answered(self) -> list[tuple[str, str]]:
        """Return the turns of a conversation that does not end with a question.

        Raises:
            PromptError: it does.
        """
        found = [(question, answer) for question, answer in self.turns if answer is not None]
        if len(found) == len(self.turns):
            return found
        raise PromptError(
            "messages of a chat must end with an assistant message; pass the last user message to"
            " send or stream"
        )


def read_messages(
    messages: object, inputs: Inputs, system_message: str | None = None
) -> Conversation:
    """Check messages and read what they say.

    Each is `{"role": "system" | "user" | "assistant", "content": ...}`: a system message at most,
    first, then users' and assistants' in turn. Content is a string or a list of parts:
    `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and `{"type": "image_url",
    "image_url": {"url": ...}}` with a path, `file://` or a data URI. A part of an image may say
    `frame`, `upright` and `max_tiles` of a `Picture`, or `tiles`: it is that many tiles, one below
    the other, of a picture of `size` (width, height). Images that come before the text are written
    as `Inputs.question` does, others where they stand.

    Args:
        inputs: of the model that is asked, whose template places images.
        system_message: where the messages have none.

    Raises:
        PromptError: they are something else; the message names the place.
        ImageError: a picture cannot be had.
    """
    system_message = text_or_none("system_message", system_message)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise PromptError(f"messages are a list of role and content, not {quoted(messages)}")
    turns: list[tuple[str, str | None]] = []
    shown: list[Shown] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role, content = _role_and_content(place, message)
        asked = bool(turns) and turns[-1][1] is None
        if role == "system":
            if number or system_message is not None:
                raise PromptError(
                    f"{place} is a system message; there is one at most, as the first message or"
                    " as system_message"
                )
            system_message = _text(content, f"{place}.content")
        elif role == "user" and not asked:
            question, new = _question(content, f"{place}.content", len(shown), inputs)
            turns.append((question, None))
            shown += new
        elif role == "assistant" and asked:
            turns[-1] = (turns[-1][0], _text(content, f"{place}.content"))
        else:
            expected = "assistant" if asked else "user"
            raise PromptError(f"{place} has the role {quoted(role)}; expected {expected} here")
    return Conversation(turns, shown, system_message)


def asked(
    prompt: str | Sequence[int] | None,
    images: Images,
    messages: Messages | None,
    system_message: str | None,
    inputs: Inputs,
) -> Conversation:
    """Return the conversation that a prompt or messages ask to be answered; token ids have no
    turns.

    Raises:
        PromptError: both are given, or none, or they are no question.
        ImageError: a picture of the messages cannot be had.
    """
    given = pictures("images", images)
    if messages is not None:
        if prompt is not None or given:
            raise PromptError("pass a prompt and images, or messages that hold both, not all three")
        return read_messages(messages, inputs, system_message).question()
    if prompt is None:
        raise PromptError("there is neither a prompt nor messages; ask something")
    system_message = text_or_none("system_message", system_message)
    shown = [Shown("", image) for image in given]
    if not isinstance(prompt, str):
        return Conversation([], shown, system_message)
    question = inputs.question(prompt, len(shown), earlier_images=0)
    return Conversation([(question, None)], shown, system_message)


def _role_and_content(place: str, message: object) -> tuple[str, object]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{place} is {quoted(message)}; expected role and content")
    for key in ("role", "content"):
        if key not in message:
            raise PromptError(f"{place} has no {key}")
    role = message["role"]
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise PromptError(f"{place}.role is {quoted(role)}; expected system, user or assistant")
    return role, message["content"]


def _text(content: object, place: str) -> str:
    """Content of text alone."""
    parts = _parts(content, place)
    for where, part in parts:
        if isinstance(part, Shown):
            raise PromptError(f"{where} is an image; only user messages have images")
    return "\n".join(str(part) for _, part in parts)


def _question(content: object, place: str, earlier: int, inputs: Inputs) -> tuple[str, list[Shown]]:
    """A question with its markers, and its pictures; `earlier` ones were shown before."""
    parts = [part for _, part in _parts(content, place)]
    shown = [part for part in parts if isinstance(part, Shown)]
    leading = all(isinstance(part, Shown) for part in parts[: len(shown)])
    lines = [
        IMAGE_PLACEHOLDER if isinstance(part, Shown) else part
        for part in parts[len(shown) if leading else 0 :]
    ]
    try:
        return inputs.question("\n".join(lines), len(shown), earlier), shown
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from error


def _parts(content: object, place: str) -> list[tuple[str, str | Shown]]:
    """Places and what stands there: text or a picture."""
    if isinstance(content, str):
        return [(place, content)]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(f"{place} is {quoted(content)}; expected a string or a list of parts")
    return [
        (f"{place}[{number}]", _part(part, f"{place}[{number}]"))
        for number, part in enumerate(content)
    ]


def _part(part: object, place: str) -> str | Shown:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in _EXPECTED:
        raise PromptError(
            f"{place} is {quoted(part)}; expected a part of type text, image or image_url"
        )
    value = part.get(kind)
    if kind == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if value is None or (kind != "image" and not isinstance(value, str)):
        raise PromptError(f"{place}.{kind} is {quoted(value)}; expected {_EXPECTED[kind]}")
    return str(value) if kind == "text" else Shown(place, read_image(part, value, place))


_EXPECTED = {
    "text": "a string",
    "image": "a path, bytes, PIL.Image or uint8 array",
    "image_url": 'an object with a "url"',
}


def _tiled(picture: Shown, inputs: Inputs, max_tiles: int | None) -> TiledImage:
    try:
        if isinstance(picture.source, CutImage):
            return inputs.tiles(picture.source.pixels(), picture.source.size)
        return inputs.tile(picture.source, max_tiles)
    except ImageError as error:
        if not picture.place:
            raise
        raise ImageError(f"{picture.place}: {error}") from error
