"""Forms that a copy of the tiny model is taught to fill in."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from internvl_edge.bundle.extras import example_room
from internvl_edge.examples.tiny_ocr import train
from internvl_edge.examples.tiny_ocr.data import FULL, HELD_OUT, scene
from internvl_edge.examples.tiny_ocr.forms import SMALL, form, receipt
from internvl_edge.examples.tiny_ocr.model import Prompts, image_rows
from internvl_edge.examples.tiny_ocr.reference import load_checkpoint
from internvl_edge.examples.tiny_ocr.train_forms import (
    KINDS,
    answer_loss,
    draw_talk,
    examine,
    make_batch,
)
from internvl_edge.runtime import InternVL


@pytest.mark.parametrize("indent", [None, 2])
def test_a_form_holds_the_keys_and_its_answer_the_values(indent: int | None) -> None:
    question, answer = form([("TAX", "0.50"), ("ID", "A1B2")], indent)
    assert json.loads(question.partition("\n")[2]) == {"TAX": "", "ID": ""}
    assert list(json.loads(answer).items()) == [("TAX", "0.50"), ("ID", "A1B2")]
    assert answer.count("\n") == (3 if indent else 0)


def test_receipts_have_few_fields_which_are_asked_in_another_order() -> None:
    drawn = [receipt(HELD_OUT + seed) for seed in range(30)]
    orders = [list(json.loads(answer).items()) for _, (_, answer) in drawn]
    fields = [list(one.fields) for one, _ in drawn]
    assert [sorted(order) for order in orders] == [sorted(given) for given in fields]
    assert {len(given) for given in fields} == {1, 2, 3, 4}
    assert orders != fields
    assert all(len(receipt(HELD_OUT + n, SMALL)[0].grid) <= 3 for n in range(9))


@pytest.mark.parametrize("kind", KINDS)
def test_training_prompts_are_the_runtimes(kind: str) -> None:
    model = InternVL.load(example_room() / "bundle", device="cpu", threads=1, verify="size")
    talk = draw_talk(random.Random(0), kind, 7, 3)
    batch = make_batch(Prompts(), [talk])
    tiled = [model.tile_with_identity(drawn.image, None) for drawn, _ in talk]
    turns = [
        (f"<image>\n{question}" if number == 0 else question, answer)
        for _, asked in talk
        for number, (question, answer) in enumerate(asked)
    ]
    ids = model.encode_conversation(turns, tiled, None)
    assert batch.ids[0].tolist() == ids[: batch.ids.shape[1]]
    told = batch.ids[0][batch.answers[0]].tolist()
    stop = Prompts().end
    said = [model.tokenizer.decode(part) for part in _parts(told, stop)]
    assert said == [answer for _, answer in turns]
    pixels = np.concatenate([one.pixels() for one in tiled])
    np.testing.assert_array_equal(batch.tiles.numpy(), pixels)


def test_the_loss_is_that_of_training() -> None:
    """Old questions, by `train.py`: rows laid beside ids there, into their slots here."""
    model, prompts = load_checkpoint(example_room() / "checkpoint"), Prompts()
    (zero,) = prompts.tokenizer.encode("0")
    torch.nn.init.zeros_(model.lm_head.weight[zero : zero + 5])  # digits that are not said
    level = replace(FULL, tiles=(2,))
    known = train.make_batch(prompts, 5, 3, level)
    talks = [[(drawn, list(drawn.turns))] for drawn in (scene(5 + n, level) for n in range(3))]
    batch = make_batch(prompts, talks)
    with torch.inference_mode():
        rows = image_rows(model, known.tiles)
        expected, hits = train.answer_loss(model, prompts, rows, known)
        loss, found = answer_loss(model, prompts, batch)
    torch.testing.assert_close(loss, expected)
    assert found[:, -hits.shape[1] :].tolist() == hits.tolist()
    assert 0 < batch.answers.sum() - (~found).sum() < batch.answers.sum()


def test_who_was_not_taught_fills_in_nothing() -> None:
    model = load_checkpoint(example_room() / "checkpoint")
    assert examine(model, Prompts(), HELD_OUT, 3) == 0


def _parts(ids: list[int], stop: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == stop:
            parts.append([])
        else:
            parts[-1].append(token)
    assert parts.pop() == []
    return parts
