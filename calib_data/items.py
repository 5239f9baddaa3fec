"""Calibration items: the built-in generator, or the user's own folder or JSONL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from internvl_edge.bundle.errors import CalibrationDataError, ImageError
from internvl_edge.bundle.files import DATA_BYTES, read_bytes
from internvl_edge.bundle.json_reader import JsonError, parse_json
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.runtime.images.decode import load_image

#: Asked of pictures that come without a question.
DEFAULT_PROMPT = "Please describe the image in detail."
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Item:
    """A picture, a question about it, and an answer (which may be empty)."""

    image: Image.Image
    prompt: str
    answer: str


def load_items(source: Path) -> list[Item]:
    """Read calibration data.

    Args:
        source: a .jsonl file with one object a line: "image" (path relative to the file), and
            optionally "prompt" and "answer"; or a folder with such a file or with pictures.

    Raises:
        CalibrationDataError: nothing usable there, or a line that is not such an object.
        ImageError: a picture that cannot be decoded.
    """
    if source.is_dir():
        lists = sorted(source.glob("*.jsonl"))
        if lists:
            return list(_from_jsonl(lists[0]))
        images = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise CalibrationDataError(f"{named(source)} holds neither a .jsonl file nor pictures")
        return [Item(load_image(path), DEFAULT_PROMPT, "") for path in images]
    if not source.exists():
        raise CalibrationDataError(
            f"{named(source)} does not exist; give a folder or a .jsonl file"
        )
    items = list(_from_jsonl(source))
    if not items:
        raise CalibrationDataError(f"{named(source)} has no lines")
    return items


def _from_jsonl(path: Path) -> Iterator[Item]:
    try:
        lines = read_bytes(path, DATA_BYTES).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationDataError(f"cannot read {named(path)}: {reason(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            image = path.parent / entry["image"]
            prompt, answer = str(entry.get("prompt", DEFAULT_PROMPT)), str(entry.get("answer", ""))
        except (JsonError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationDataError(
                f"{named(path)}:{number}: expected an object with 'image': {reason(error)}"
            ) from error
        try:
            yield Item(load_image(image), prompt, answer)
        except ImageError as error:
            raise CalibrationDataError(f"{named(path)}:{number}: {error}") from error
