"""Answers of tiny_ocr that repeat what was said before, and some that cannot.

It was not taught to write JSON. A receipt as JSON is composed: the keys are those of a form that
the prompt holds, each value is its own answer to the question for that key.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.bundle.prompt import IMAGE_PLACEHOLDER
from internvl_edge.examples.tiny_ocr.data import ALL_LINES, HELD_OUT, Scene, scene
from internvl_edge.runtime import InternVL

#: Fields of the pictures whose lines the model was trained to read.
MOST_FIELDS = 4
LONGEST = 96
#: Stands for an image slot in a prompt.
SLOT = -1
#: How a receipt is asked for as JSON, before the form.
FORM = "Fill in this form."
#: As chat models write it.
INDENT = 2


@dataclass(frozen=True)
class Answered:
    """A prompt and the model's own answer.

    Attributes:
        prompt: token ids, `SLOT` where an image is.
        answer: token ids, the stop id included.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def answered(model: InternVL, tokens: int) -> dict[str, list[Answered]]:
    """Ask about held-out pictures until each kind of answer has so many tokens at least.

    Every picture is asked in three conversations. Their answers by what they can be guessed from:
    nothing; the fields that were asked before; the lines that were read before, whole or by field;
    of a receipt as JSON, the form.
    """
    found: defaultdict[str, list[Answered]] = defaultdict(list)
    for drawn in _pictures():
        fields = [f"What is the {key}?" for key, _ in drawn.fields]
        _, *again = _conversation(model, drawn, [ALL_LINES, ALL_LINES])
        found["lines read again"] += again
        *asked, lines = _conversation(model, drawn, [*fields, ALL_LINES])
        found["lines after their fields"].append(lines)
        found["JSON, a form before"].append(_as_json(model, drawn, asked))
        lines, *rest = _conversation(model, drawn, [ALL_LINES, *fields])
        found["fields after their lines"] += rest
        found["lines, nothing before"].append(lines)
        if all(sum(len(one.answer) for one in kind) >= tokens for kind in found.values()):
            break
    return {name: list(_within(kind, tokens)) for name, kind in found.items()}


def _pictures() -> Iterator[Scene]:
    scenes = (scene(HELD_OUT + seed) for seed in count())
    return (drawn for drawn in scenes if len(drawn.fields) <= MOST_FIELDS)


def _conversation(model: InternVL, drawn: Scene, questions: list[str]) -> list[Answered]:
    chat, found = model.chat(), []
    tiled = [model.tile_with_identity(drawn.image, None)]
    for question in questions:
        images = [] if chat.history else [drawn.image]
        reply = chat.send(question, images, max_new_tokens=LONGEST, sampling=ONE_BY_ONE)
        # The question as the history has it: with the picture's marker.
        turns: list[tuple[str, str | None]] = [*chat.history[:-1], (chat.history[-1][0], None)]
        prompt = _slotted(model, model.encode_conversation(turns, tiled, None))
        found.append(Answered(prompt, tuple(reply.token_ids)))
    return found


def _as_json(model: InternVL, drawn: Scene, asked: Sequence[Answered]) -> Answered:
    """A receipt as JSON, of the answers to the questions for its fields."""
    keys = [key for key, _ in drawn.fields]
    values = [model.tokenizer.decode(one.answer[:-1]) for one in asked]
    form = json.dumps(dict.fromkeys(keys, ""), indent=INDENT)
    filled = json.dumps(dict(zip(keys, values, strict=True)), indent=INDENT)
    question = f"{IMAGE_PLACEHOLDER}\n{FORM}\n{form}"
    tiled = [model.tile_with_identity(drawn.image, None)]
    prompt, whole = (
        model.encode_conversation([(question, answer)], tiled, None) for answer in (None, filled)
    )
    answer = whole[len(prompt) :]
    stop = answer.index(asked[0].answer[-1])
    return Answered(_slotted(model, prompt), tuple(answer[: stop + 1]))


def _slotted(model: InternVL, ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(SLOT if token == model.context_id else token for token in ids)


def _within(kind: list[Answered], tokens: int) -> Iterator[Answered]:
    """The first answers of a kind that have so many tokens."""
    for one in kind:
        if tokens <= 0:
            return
        yield one
        tokens -= len(one.answer)
