"""Answers as text: what the reference's tokenizer would write of their tokens, or all there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, scripted

from internvl_edge.runtime import InternVL

SPACED = "Total : 5 . 00 , tax ! It 's n't"
CLEAN = "Total : 5. 00, tax! It'sn't"
GROUNDED = "<ref>the lamp</ref><box>[[10, 20, 500, 1000]]</box>"


@pytest.fixture
def told(golden_bundle: Path) -> tuple[InternVL, Scripted]:
    return scripted(golden_bundle)


def test_blanks_go_also_into_the_history(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    ids = model.tokenizer.encode(SPACED)[1:]
    for given, wanted in (({}, CLEAN), ({"clean_up": False}, SPACED)):
        backend.script = list(ids)
        assert model.generate("Hello", **given).text == wanted
        backend.script = list(ids)
        stream = model.stream("Hello", **given)
        assert "".join(stream).strip() == wanted
        chat = model.chat()
        backend.script = list(ids)
        assert chat.send("Hello", **given).text == wanted
        assert chat.history == [("Hello", wanted)]


def test_a_stop_text_is_sought_in_what_is_shown(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    for given, stop, wanted in (
        ({}, "5.", "Total :"),
        ({}, "5 .", CLEAN),
        ({"clean_up": False}, "5 .", "Total :"),
    ):
        backend.script = model.tokenizer.encode(SPACED)[1:]
        assert model.generate("Hello", stop=stop, **given).text == wanted


def test_a_cancelled_answer_ends_with_what_was_held_back(
    told: tuple[InternVL, Scripted],
) -> None:
    model, backend = told
    backend.script = model.tokenizer.encode("a n")[1:]
    count = len(backend.script)
    stream = model.stream("Hello", max_new_tokens=count)
    assert "".join(stream) == "a n"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "the lamp[[10, 20, 500, 1000]]"),
        (
            {"skip_special_tokens": False},
            "<ref> the lamp </ref> <box> [[10, 20, 500, 1000]] </box>",
        ),
    ],
    ids=str,
)
def test_control_tokens_are_shown_where_they_are_wanted(
    told: tuple[InternVL, Scripted], given: dict[str, Any], wanted: str
) -> None:
    model, backend = told
    for ask in (model.generate, model.chat().send):
        backend.script = model.tokenizer.encode(GROUNDED)[1:]
        reply = ask("Where?", **given)
        assert reply.text == wanted
        assert reply.token_ids == [*model.tokenizer.encode(GROUNDED)[1:], model.stop_id]
