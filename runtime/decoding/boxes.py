"""Places in a picture that an answer names, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What coordinates are written in: thousandths of the picture's width and height.
SCALE = 1000

#: `<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>`; the label may be missing.
_GROUNDED = re.compile(r"(?:<ref>([^<]*)</ref>\s*)?<box>\s*\[([\d\s,.\[\]]*)\]\s*</box>")
_COORDINATES = re.compile(r"\[([\d\s,.]*)\]")


@dataclass(frozen=True)
class Box:
    """A place in a picture, in its pixels; (0, 0) is the upper left corner.

    Attributes:
        left, top, right, bottom: edges, `left <= right` and `top <= bottom`.
        label: what is there, as the answer says; "" where it does not.
    """

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""


def read_boxes(text: str, size: tuple[int, int] | None) -> list[Box]:
    """Find the boxes in an answer's text, its control tokens included.

    Args:
        text: holds `<box>[[x1, y1, x2, y2]]</box>` in thousandths, several in one or one after the
            other. What is written in another way is no box.
        size: width and height of the picture in pixels; None: there is none, and no boxes.

    Returns:
        boxes in the order of the text, cut at the picture's edges.
    """
    if size is None:
        return []
    found = []
    for label, inner in _GROUNDED.findall(text):
        for written in _COORDINATES.findall(inner):
            corners = _numbers(written)
            if len(corners) == 4:
                found.append(_box(corners, size, " ".join(label.split())))
    return found


def _numbers(written: str) -> list[float]:
    try:
        return [float(number) for number in written.split(",")]
    except ValueError:
        return []


def _box(corners: list[float], size: tuple[int, int], label: str) -> Box:
    x1, y1, x2, y2 = (
        min(value, SCALE) * side / SCALE for value, side in zip(corners, size * 2, strict=True)
    )
    return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), label)
