"""Recorded receipts as JSON: they are what a trained model said, and are said to be no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internvl_edge.bench.answers import receipts
from internvl_edge.bench.answers.receipts import KINDS, Filled, coded, decoded, recorded
from internvl_edge.bench.answers.repeats import SLOT
from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.json_reader import read_object
from internvl_edge.examples.tiny_ocr.data import HELD_OUT
from internvl_edge.examples.tiny_ocr.forms import FORM, receipt
from internvl_edge.runtime import InternVL


@pytest.fixture(scope="module")
def demo() -> InternVL:
    """A model with the tokenizer, the template and the tiles of the one that answered."""
    return InternVL.load(example_room() / "bundle", device="cpu", threads=1, verify="size")


def text(model: InternVL, one: Filled) -> str:
    *answer, stop = one.said.answer
    assert stop == model.stop_id
    return model.tokenizer.decode(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_json_with_the_keys_of_the_form(demo: InternVL, kind: str) -> None:
    """In the form's order; one leaves its last key out."""
    answers = recorded()[kind]
    assert len(answers) == receipts.KEPT
    whole = 0
    for one in answers:
        prompt = demo.tokenizer.decode([token for token in one.said.prompt if token != SLOT])
        form = json.loads(prompt.rpartition(FORM)[2].rpartition("}")[0] + "}")
        assert not any(form.values())
        filled = json.loads(text(demo, one))
        assert list(filled) == list(form)[: len(filled)]
        assert all(filled.values())
        whole += len(filled) == len(form)
    assert whole >= receipts.KEPT - 1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_about_the_receipts_they_name(demo: InternVL, kind: str) -> None:
    """The prompts are the runtime's; right is what the pictures were drawn with."""
    right = 0
    for one in recorded()[kind]:
        levels = KINDS[kind]
        shown = [
            receipt(HELD_OUT + one.seed + 1 - len(levels) + n, level)
            for n, level in enumerate(levels)
        ]
        tiled = [demo.tile_with_identity(drawn.image, None) for drawn, _ in shown]
        turns = [(f"<image>\n{question}", answer) for _, (question, answer) in shown]
        *_, (question, expected) = turns
        assert one.right == (text(demo, one) == expected)
        right += one.right
        asked = demo.encode_conversation([*turns[:-1], (question, None)], tiled, None)
        slotted = [SLOT if token == demo.context_id else token for token in asked]
        if len(shown) == 1:
            assert list(one.said.prompt) == slotted
        else:  # in which the model's own first answer stands
            end = slotted[len(slotted) - slotted[::-1].index(SLOT) :]
            assert one.said.prompt.count(SLOT) == slotted.count(SLOT)
            assert list(one.said.prompt[-len(end) :]) == end
    assert right >= 0.9 * receipts.KEPT


def test_most_forms_are_filled_in_exactly() -> None:
    for kind in read_object(receipts.RECORDED)["kinds"].values():
        assert kind["right"] >= 0.9 * kind["forms"]


@pytest.mark.parametrize("ids", [(), (5,), (SLOT,), (1, SLOT, SLOT, SLOT, 0, SLOT, 7)])
def test_what_is_coded_is_read_again(ids: tuple[int, ...]) -> None:
    assert decoded(coded(ids)) == ids


def test_a_run_of_slots_is_one_number() -> None:
    assert coded((1, *[SLOT] * 96, 504)) == "1 -96 504"


def test_the_command_stores_what_a_model_says(
    demo: InternVL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's model was not taught: nothing it says is right, and that is what is stored."""
    file = tmp_path / "answers.json"
    given = [str(example_room() / "bundle"), "--forms", "2", "-o", str(file)]
    assert receipts.main(given) == 0
    assert capsys.readouterr().out == "".join(
        f"{kind}: 0 of 2 filled in exactly\n" for kind in KINDS
    )
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert "--forms 2 " in stored["command"]
    assert {name: kind["right"] for name, kind in stored["kinds"].items()} == dict.fromkeys(
        KINDS, 0
    )
    for kind in KINDS:
        assert recorded(file)[kind] == list(receipts.filled(demo, kind, 2))


@pytest.mark.parametrize("wrong", [["nowhere"], ["nowhere", "--forms", "0"]])
def test_what_cannot_be_asked_is_one_error(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.json"
    assert receipts.main([*wrong, "-o", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not file.exists()
