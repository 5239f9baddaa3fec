"""Receipts as JSON, by a model that was taught to write it: recorded answers, and how they came.

    python -m internvl_edge.bench.answers.receipts BUNDLE [--forms N] [-o FILE]

The demo's model writes no JSON. A copy of it that was taught to is not part of this program
(`examples/tiny_ocr/train_forms.py`); its answers are: `receipts.json`. The command asks that copy's
bundle about held-out receipts, says how many forms are filled in exactly, and writes the first of
its answers, right or wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from internvl_edge.bench.answers.repeats import SLOT, Answered, Question, conversation
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bundle.errors import InternVLEdgeError
from internvl_edge.bundle.json_reader import read_object
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.examples.tiny_ocr.data import HELD_OUT
from internvl_edge.examples.tiny_ocr.forms import RECEIPT, SMALL, receipt
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.options import at_least

RECORDED = Path(__file__).with_name("receipts.json")
COMMAND = "python -m internvl_edge.bench.answers.receipts BUNDLE --forms {} -o FILE"
#: Answers of each kind that are stored.
KEPT = 40
#: Each kind of answer: how large the receipts of a conversation are, of which the last is told.
KINDS = {"a receipt as JSON": (RECEIPT,), "a second receipt as JSON": (SMALL, SMALL)}


@dataclass(frozen=True)
class Filled:
    """A form that the model filled in.

    Attributes:
        seed: of its receipt, behind `HELD_OUT`; those shown before it have the seeds before.
        said: the prompt and the answer.
        right: whether the answer is the receipt's, to the last character.
    """

    seed: int
    said: Answered
    right: bool


def filled(model: InternVL, kind: str, forms: int) -> Iterator[Filled]:
    """Yield the model's answers about so many held-out receipts."""
    levels = KINDS[kind]
    for last in range(len(levels) - 1, forms * len(levels), len(levels)):
        seeds = range(last + 1 - len(levels), last + 1)
        shown = [receipt(HELD_OUT + seed, level) for seed, level in zip(seeds, levels, strict=True)]
        questions: list[Question] = [(question, drawn.image) for drawn, (question, _) in shown]
        *_, said = conversation(model, questions)
        _, (_, expected) = shown[-1]
        *answer, end = said.answer
        right = end == model.stop_id and model.tokenizer.decode(answer) == expected
        yield Filled(last, said, right)


def recorded(path: Path = RECORDED) -> dict[str, list[Filled]]:
    """Return the answers that `path` holds, by kind."""
    kinds = read_object(path)["kinds"]
    return {name: [_read(one) for one in kind["answers"]] for name, kind in kinds.items()}


def coded(ids: Sequence[int]) -> str:
    """Write token ids with spaces between; a run of image slots is its length, negated."""
    runs = ((token, list(run)) for token, run in groupby(ids))
    places = ((-len(run),) if token == SLOT else run for token, run in runs)
    return " ".join(str(place) for run in places for place in run)


def decoded(text: str) -> tuple[int, ...]:
    """Read what `coded` wrote."""
    places = map(int, text.split())
    runs = ((place,) if place >= 0 else (SLOT,) * -place for place in places)
    return tuple(token for run in runs for token in run)


def _read(stored: dict[str, Any]) -> Filled:
    said = Answered(decoded(stored["prompt"]), decoded(stored["answer"]))
    return Filled(stored["seed"], said, stored["right"])


def _stored(one: Filled) -> dict[str, Any]:
    prompt, answer = coded(one.said.prompt), coded(one.said.answer)
    return {"seed": one.seed, "right": one.right, "prompt": prompt, "answer": answer}


def record(bundle: Path, forms: int) -> dict[str, Any]:
    """Ask a bundle for so many forms of each kind, print how many are right, return what is stored.

    Raises:
        BundleError: it cannot be used.
    """
    model = InternVL.load(bundle, device="cpu")
    kinds = {}
    for kind in KINDS:
        answers = list(filled(model, kind, forms))
        right = sum(one.right for one in answers)
        print(f"{kind}: {right} of {forms} filled in exactly")
        stored = [_stored(one) for one in answers[:KEPT]]
        kinds[kind] = {"forms": forms, "right": right, "answers": stored}
    return {
        "format": "internvl-edge receipts",
        "version": 1,
        "command": COMMAND.format(forms),
        "precision": open_bundle(bundle).manifest.precision,
        "kinds": kinds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m internvl_edge.bench.answers.receipts")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="it fills in forms")
    parser.add_argument("--forms", type=at_least(1, "--forms"), default=500, help="of each kind")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    try:
        given = parser.parse_args(arguments)
        check_writable(given.output)
        result = record(given.bundle, given.forms)
        if given.output is not None:
            write_result(result, given.output)
    except InternVLEdgeError as error:
        print(f"error: {error.told(flags=True)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
