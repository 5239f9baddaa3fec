"""Places an answer names are data, in pixels of the picture that was shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted, scripted

from internvl_edge.runtime import Box, InternVL
from internvl_edge.runtime.decoding.boxes import read_boxes

#: Height 100, width 400.
WIDE = np.zeros((100, 400, 3), np.uint8)
LAMP = "<ref>the  lamp</ref><box>[[10, 20, 500, 1000]]</box>"
FOUND = Box(4.0, 2.0, 200.0, 100.0, "the lamp")


@pytest.fixture(scope="module")
def told(golden_bundle: Path) -> tuple[InternVL, Scripted]:
    return scripted(golden_bundle)


@pytest.mark.parametrize("shown", [True, False])
def test_boxes_are_in_pixels_of_the_picture(told: tuple[InternVL, Scripted], shown: bool) -> None:
    """Whether the text shows them or not."""
    model, backend = told
    for ask in (model.generate, model.chat().send):
        backend.script = model.tokenizer.encode(LAMP)[1:]
        reply = ask("Where?", [WIDE], skip_special_tokens=not shown)
        assert reply.boxes == [FOUND]
        assert ("<box>" in reply.text) == shown


def test_boxes_of_a_later_turn_are_of_the_picture_shown_last(
    told: tuple[InternVL, Scripted],
) -> None:
    model, backend = told
    chat = model.chat(max_tiles=1)
    assert chat.send("Hello").boxes == []
    for picture in ([WIDE.transpose(1, 0, 2)], [WIDE], []):
        backend.script = model.tokenizer.encode(LAMP)[1:]
        boxes = chat.send("Where?", picture).boxes
    assert boxes == [FOUND]


def test_there_are_none_without_a_picture(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    backend.script = model.tokenizer.encode(LAMP)[1:]
    assert model.generate("Where?").boxes == []


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<box>[[0, 0, 1000, 1000]]</box>", [Box(0, 0, 400, 100)]),
        ("<box> [[0,0,500,500]] </box>", [Box(0, 0, 200, 50)]),
        (
            "a <ref>b</ref> <box>[[0, 0, 1, 1], [2, 2, 3, 3]]</box> c <box>[[4, 4, 5, 5]]</box>",
            [Box(0, 0, 0.4, 0.1, "b"), Box(0.8, 0.2, 1.2, 0.3, "b"), Box(1.6, 0.4, 2, 0.5)],
        ),
        ("<box>[[500, 1000, 0, 0]]</box>", [Box(0, 0, 200, 100)]),
        ("<box>[[0, 0, 1200, 99999]]</box>", [Box(0, 0, 400, 100)]),
        ("<box>[[0, 0, 12.5, 10]]</box>", [Box(0, 0, 5, 1)]),
        ("<box>[[1, 2, 3]]</box>", []),
        ("<box>[[1, 2, 3, .]]</box>", []),
        ("<box>[[a, 2, 3, 4]]</box>", []),
        ("<box>[1, 2, 3, 4]</box>", []),
        ("<box>[[1, 2, 3, 4]]", []),
        ("[[1, 2, 3, 4]]", []),
        ("<box></box>", []),
    ],
)
def test_what_is_a_box(text: str, boxes: list[Box]) -> None:
    assert read_boxes(text, (400, 100)) == boxes
    assert read_boxes(text, None) == []


@given(st.text(alphabet="<box>/ref[]0123., ", max_size=60), st.integers(1, 9), st.integers(1, 9))
def test_boxes_lie_in_the_picture(text: str, width: int, height: int) -> None:
    for box in read_boxes(f"<box>[[{text}]]</box>{text}", (width, height)):
        assert 0 <= box.left <= box.right <= width
        assert 0 <= box.top <= box.bottom <= height
