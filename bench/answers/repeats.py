"""Answers of tiny_ocr that repeat what was said before, and some that cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from PIL import Image

from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.examples.tiny_ocr.data import ALL_LINES, HELD_OUT, Scene, scene
from internvl_edge.runtime import InternVL

#: Fields of the pictures whose lines the model was trained to read.
MOST_FIELDS = 4
LONGEST = 128
#: Stands for an image slot in a prompt.
SLOT = -1

#: A question, and the picture that is shown with it.
Question = tuple[str, Image.Image | None]


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
    nothing; the fields that were asked before; the lines that were read before, whole or by field.
    """
    found: defaultdict[str, list[Answered]] = defaultdict(list)
    for drawn in _pictures():
        fields = [f"What is the {key}?" for key, _ in drawn.fields]
        _, *again = _about(model, drawn, [ALL_LINES, ALL_LINES])
        found["lines read again"] += again
        field, *_, lines = _about(model, drawn, [*fields, ALL_LINES])
        found["a field, nothing before"].append(field)
        found["lines after their fields"].append(lines)
        lines, *rest = _about(model, drawn, [ALL_LINES, *fields])
        found["fields after their lines"] += rest
        found["lines, nothing before"].append(lines)
        if all(sum(len(one.answer) for one in kind) >= tokens for kind in found.values()):
            break
    return {name: list(within(kind, tokens)) for name, kind in found.items()}


def conversation(model: InternVL, questions: Sequence[Question]) -> list[Answered]:
    """Ask one question after another, greedily, and return the answers with their prompts."""
    chat, found, shown = model.chat(), [], []
    for question, image in questions:
        images = [] if image is None else [image]
        reply = chat.send(question, images, max_new_tokens=LONGEST, sampling=ONE_BY_ONE)
        shown += [model.tile_with_identity(one, None) for one in images]
        # The question as the history has it: with the picture's marker.
        turns: list[tuple[str, str | None]] = [*chat.history[:-1], (chat.history[-1][0], None)]
        ids = model.encode_conversation(turns, shown, None)
        prompt = tuple(SLOT if token == model.context_id else token for token in ids)
        found.append(Answered(prompt, tuple(reply.token_ids)))
    return found


def within(kind: Sequence[Answered], tokens: int) -> Iterator[Answered]:
    """Yield the first answers of a kind that have so many tokens."""
    for one in kind:
        if tokens <= 0:
            return
        yield one
        tokens -= len(one.answer)


def _pictures() -> Iterator[Scene]:
    scenes = (scene(HELD_OUT + seed) for seed in count())
    return (drawn for drawn in scenes if len(drawn.fields) <= MOST_FIELDS)


def _about(model: InternVL, drawn: Scene, questions: list[str]) -> list[Answered]:
    first, *others = questions
    return conversation(model, [(first, drawn.image), *((other, None) for other in others)])
