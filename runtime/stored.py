"""Conversations as JSON: messages that are read again as they were said."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.disk import full_disk, is_full
from internvl_edge.bundle.errors import ImageError, OutputError, PromptError
from internvl_edge.bundle.files import DATA_BYTES, write_bytes
from internvl_edge.bundle.json_reader import JsonError, read_json
from internvl_edge.bundle.prompt import IMAGE_PLACEHOLDER
from internvl_edge.bundle.quoting import named, quoted, reason
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.runtime.arguments import file_path, flag, whole, whole_or
from internvl_edge.runtime.images.decode import load_pixels
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.sources import ImageLike, Picture, data_uri

#: What a part of an image may say beside it, as `Picture` has it.
_OPTIONS = ("frame", "upright", "max_tiles")


@dataclass(frozen=True)
class CutImage:
    """A picture of which the tiles alone are stored, one below the other.

    Attributes:
        source: the picture of the tiles.
        tiles: how many there are.
        size: width and height in pixels of what they were cut from; None: it is not known.
    """

    source: ImageLike
    tiles: int
    size: tuple[int, int] | None

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 `(tiles, S, S, 3)`.

        Raises:
            ImageError: the picture cannot be read, or is not so many squares.
        """
        pixels = load_pixels(self.source)
        height, width, _ = pixels.shape
        if height != width * self.tiles:
            raise ImageError(f"{width} x {height} pixels are not {self.tiles} square tiles")
        return pixels.reshape(self.tiles, width, width, 3)


def written(
    turns: Sequence[tuple[str, str]],
    images: Sequence[TiledImage],
    system_message: str | None,
    *,
    embed: bool,
) -> list[dict[str, Any]]:
    """Return a conversation as messages of plain JSON; `read_messages` reads them.

    Args:
        turns: questions with their `<image>` markers, and answers.
        images: in the order of the markers.
        embed: whether images that came from files are written in full; else by their path.
    """
    messages: list[dict[str, Any]] = []
    if system_message is not None:
        messages.append({"role": "system", "content": system_message})
    left = iter(images)
    for question, answer in turns:
        shown = [next(left) for _ in range(question.count(IMAGE_PLACEHOLDER))]
        content: Any = question
        if shown:
            parts = [written_image(image, embed=embed) for image in shown]
            content = [*parts, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return messages


def written_image(image: TiledImage, *, embed: bool) -> dict[str, Any]:
    """Return an image as a part of a message, with how it was looked at."""
    if image.file is not None and not embed:
        assert isinstance(image.file.source, Path)
        return _picture(image.file.source.as_uri(), image.file)
    kept = image.kept()
    if isinstance(kept, Picture):
        return _picture(data_uri(kept.source.data), kept)
    stream = BytesIO()
    Image.fromarray(kept.reshape(-1, *kept.shape[2:])).save(stream, "PNG")
    part: dict[str, Any] = {"type": "image", "image": data_uri(stream.getvalue())}
    part["tiles"] = len(kept)
    return part if image.size is None else {**part, "size": list(image.size)}


def read_image(part: Mapping[str, Any], source: ImageLike, place: str) -> ImageLike | CutImage:
    """Return the image of a part with what it says beside it.

    Raises:
        PromptError, UsageError: an option is none.
        ImageError: the image is a `Picture`, which has options of its own.
    """
    if "tiles" in part:
        tiles = whole(f"{place}.tiles", part["tiles"])
        if tiles < 1:
            raise PromptError(f"{place}.tiles is {quoted(tiles)}, it must be at least 1")
        return CutImage(source, tiles, _size(part.get("size"), place))
    if not any(name in part for name in _OPTIONS):
        return source
    frame = whole_or(f"{place}.frame", part.get("frame"), None)
    upright = flag(f"{place}.upright", part.get("upright"))
    max_tiles = whole_or(f"{place}.max_tiles", part.get("max_tiles"), None)
    try:
        return Picture(source, frame, upright, max_tiles)
    except ImageError as error:
        raise ImageError(f"{place}: {error}") from error


def save(path: Path, messages: Sequence[Mapping[str, Any]], *, overwrite: bool) -> None:
    """Write messages as JSON in UTF-8, whole or not at all.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    text = json.dumps(messages, ensure_ascii=False, indent=1)
    try:
        write_bytes(path, text.encode(), overwrite=overwrite)
    except FileExistsError as error:
        raise OutputError(f"{named(path)} exists", [Remedy.OVERWRITE]) from error
    except OSError as error:
        if is_full(error):
            raise OutputError(full_disk(error, path)) from error
        raise OutputError(f"cannot write {named(path)}: {reason(error)}") from error


def load(path: str | os.PathLike[str]) -> Any:
    """Read messages that `save` wrote.

    Raises:
        PromptError: the file cannot be read, or is no JSON.
    """
    try:
        return read_json(file_path("messages", path), DATA_BYTES)
    except (OSError, JsonError) as error:
        raise PromptError(f"cannot read messages of {named(path)}: {reason(error)}") from error


def _picture(source: str, how: Picture) -> dict[str, Any]:
    """A part of an image, with those options that are not the usual ones."""
    told = {name: getattr(how, name) for name in _OPTIONS}
    unusual = {name: value for name, value in told.items() if not (value is None or value is False)}
    return {"type": "image", "image": source, **unusual}


def _size(value: object, place: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
        raise PromptError(f"{place}.size is {quoted(value)}; expected width and height")
    width, height = (whole(f"{place}.size", one) for one in value)
    if min(width, height) < 1:
        raise PromptError(f"{place}.size is {quoted(value)}; expected width and height")
    return width, height
