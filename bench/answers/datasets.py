"""Evaluation data: one question a line, about images beside the file.

A line is a JSON object:

    {"id": "49153", "image": "documents/xnbl0037_1.png", "question": "What is the date?",
     "answers": ["4/14/1999"]}

- "id": text or whole number, different in every line;
- "image", a path relative to the file, or "images", a list of them (which may be empty);
- "question": the text, without instructions on how to answer: the metric adds those;
- "answers": what counts as right; for "mc" letters or the text of a choice; for "vqa" ten of them;
- "choices": for "mc" only, the choices in the order of their letters;
- "metric": optional, instead of the command line's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bench.answers.metrics import LETTERS, Metric, metrics
from internvl_edge.bench.answers.vqa import ANNOTATORS
from internvl_edge.bundle.errors import DataError
from internvl_edge.bundle.files import DATA_BYTES, read_bytes
from internvl_edge.bundle.json_reader import JsonError, parse_json
from internvl_edge.bundle.quoting import named, quoted, reason

FIELDS = frozenset({"id", "image", "images", "question", "answers", "choices", "metric"})
MULTIPLE_CHOICE = "mc"


@dataclass(frozen=True)
class Question:
    """One line of the data, checked; `images` are paths, `answers` of "mc" are letters."""

    id: str
    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]
    metric: str
    choices: tuple[str, ...] = ()

    @property
    def scoring(self) -> Metric:
        return metrics()[self.metric]

    def prompt(self, suffix: str | None = None) -> str:
        """The question with its choices and the metric's suffix, or `suffix` instead of that."""
        suffix = self.scoring.suffix if suffix is None else suffix
        if not self.choices:
            return f"{self.text} {suffix}".strip()
        lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False))
        return "\n".join([self.text, *lines, suffix]).strip()

    def score(self, reply: str) -> float:
        """Return the reply's score, 0..1."""
        return self.scoring.score(reply, self.answers, self.choices)


@dataclass(frozen=True)
class Dataset:
    """A file of questions.

    Attributes:
        sha256: of the file, hex.
        metric: what was given for the lines that name none.
        questions: in the order of the file.
    """

    path: Path
    sha256: str
    metric: str | None
    questions: tuple[Question, ...]


def load_dataset(path: Path, metric: str | None = None) -> Dataset:
    """Read and check a whole file.

    Args:
        metric: of the lines that name none.

    Raises:
        DataError: the first line that cannot be used, with its number; no lines; no image there.
    """
    try:
        content = read_bytes(path, DATA_BYTES)
        lines = content.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {named(path)}: {reason(error)}") from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = _question(_parse(line), path.parent, metric)
            if question.id in questions:
                raise DataError(
                    f"the id {quoted(question.id)} stands in an earlier line; use each once"
                )
        except DataError as error:
            raise DataError(f"{named(path)}:{number}: {error}") from error
        questions[question.id] = question
    if not questions:
        raise DataError(f"{named(path)} has no lines; expected one JSON object a line")
    _check_any_image(path, list(questions.values()))
    return Dataset(path, hashlib.sha256(content).hexdigest(), metric, tuple(questions.values()))


def _parse(line: str) -> Mapping[str, Any]:
    try:
        entry = parse_json(line)
    except JsonError as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {type(entry).__name__}")
    if unknown := sorted(entry.keys() - FIELDS):
        raise DataError(f"unknown field {quoted(unknown[0])}; known: {', '.join(sorted(FIELDS))}")
    return entry


def _question(entry: Mapping[str, Any], folder: Path, default: str | None) -> Question:
    metric = entry.get("metric", default)
    if metric is None:
        raise DataError("no 'metric' in the line and none given with --metric")
    if metric not in list(metrics()):  # which may be asked for anything
        raise DataError(f"unknown metric {quoted(metric)}; known: {', '.join(metrics())}")
    identity = entry.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise DataError(f"'id' is {quoted(identity)}, expected text or a whole number")
    text = entry.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"'question' is {quoted(text)}, expected text")
    if ("image" in entry) == ("images" in entry):
        raise DataError("expected either 'image' or 'images'")
    images = [entry["image"]] if "image" in entry else entry["images"]
    choices = _texts("choices", entry.get("choices", []))
    answers = _answers(metric, _texts("answers", entry.get("answers")), choices)
    paths = tuple(folder / name for name in _texts("images", images))
    return Question(str(identity), paths, text, answers, metric, choices)


def _answers(metric: str, answers: tuple[str, ...], choices: tuple[str, ...]) -> tuple[str, ...]:
    if not answers:
        raise DataError("'answers' is empty; a question without an answer cannot be scored")
    if metric == "vqa" and len(answers) != ANNOTATORS:
        raise DataError(
            f"'answers' has {len(answers)} entries; the metric vqa is defined for the answers of"
            f" {ANNOTATORS} annotators, repetitions included"
        )
    if metric != MULTIPLE_CHOICE:
        if choices:
            raise DataError(f"'choices' is for the metric {MULTIPLE_CHOICE}, not {metric}")
        return answers
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"'choices' has {len(choices)} entries, expected 2 to {len(LETTERS)}")
    return tuple(_letter(answer, choices) for answer in answers)


def _letter(answer: str, choices: tuple[str, ...]) -> str:
    """An answer as a letter: a letter stands for itself even where it is also a choice's text."""
    if len(answer) == 1 and answer in LETTERS[: len(choices)]:
        return answer
    if choices.count(answer) != 1:
        raise DataError(
            f"the answer {quoted(answer)} is neither a letter up to {LETTERS[len(choices) - 1]} nor"
            " the text of one choice"
        )
    return LETTERS[choices.index(answer)]


def _texts(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise DataError(f"'{field}' is {quoted(value)}, expected a list of texts, none empty")
    return tuple(value)


def _check_any_image(path: Path, questions: Sequence[Question]) -> None:
    """One missing image is a failed question; all of them are a mistake in the paths."""
    images = [image for question in questions for image in question.images]
    if images and not any(image.exists() for image in images):
        raise DataError(
            f"none of the {len(images)} images of {named(path)} is there, such as"
            f" {named(images[0])}; paths are relative to the file"
        )
