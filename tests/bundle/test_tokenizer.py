"""Tokenizer and templates against vectors recorded from the reference, and streaming on its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from checkpoints import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.bundle.prompt import expand_images, get_template, place_images
from internvl_edge.bundle.segments import joined
from internvl_edge.bundle.text_stream import TextStream
from internvl_edge.bundle.tokenizer import load_tokenizer

VECTORS = json.loads((GOLDEN / "tokenizer_vectors.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
TOKENIZER = load_tokenizer(GOLDEN / "model")


@pytest.mark.parametrize("case", VECTORS["encode"], ids=lambda case: repr(case["text"][:20]))
def test_encode_and_decode(case: dict[str, Any]) -> None:
    assert TOKENIZER.encode(case["text"]) == case["ids"]
    assert TOKENIZER.decode(case["ids"]) == case["decode_skip"]


def test_decode_of_random_ids() -> None:
    for case in VECTORS["decode_random"]:
        assert TOKENIZER.decode(case["ids"]) == case["decode_skip"]
    assert len(VECTORS["decode_random"]) > 10


@pytest.mark.parametrize(
    "case", PROMPTS, ids=lambda case: f"{case['template']}-{len(case['messages'])}"
)
def test_templates(case: dict[str, Any]) -> None:
    template = get_template(case["template"])
    turns = [(question, answer) for question, answer in case["messages"]]
    assert template.render(turns, case["system_message"]) == case["prompt"]
    assert template.stop == case["stop"]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=40))
def test_streamed_text_is_the_decoded_text(ids: list[int]) -> None:
    """Whatever the ids, broken UTF-8 and special tokens included."""
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_streaming_never_shows_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text)
    decoded = TOKENIZER.decode(ids)
    stream = TextStream(TOKENIZER)
    shown = ""
    for token in ids:
        shown += stream.push(token)
        assert decoded.startswith(shown)


def test_placeholders_are_placed_and_expanded() -> None:
    assert place_images("Q", 0, 0) == "Q"
    assert place_images("Q", 1, 0) == "<image>\nQ"
    assert place_images("Q", 2, 0) == "Image-1: <image>\nImage-2: <image>\nQ"
    assert place_images("Q", 1, 2) == "Image-3: <image>\nQ"
    assert place_images("a <image> b", 1, 0) == "a <image> b"
    expanded = expand_images("x <image> y <image>", iter([2, 1]))
    assert joined(expanded) == (
        "x <img><IMG_CONTEXT><IMG_CONTEXT></img> y <img><IMG_CONTEXT></img>"
    )
