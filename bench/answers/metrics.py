"""The metrics of the tasks InternVL is known for, each as its dataset's own scorer computes it.

A metric turns an answer into a score in 0..1. Its prompt suffix and the length of an answer are
those of InternVL's published evaluation.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from internvl_edge.bench.answers.vqa import vqa_accuracy

#: (prediction, accepted answers, choices) -> score in 0..1.
Scorer = Callable[[str, Sequence[str], Sequence[str]], float]

LETTERS = string.ascii_uppercase
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
#: MMMU looks for the text of a choice only in answers of more words than this.
SHORT_REPLY = 5


@dataclass(frozen=True)
class Metric:
    """A way to put a question and to score its answer.

    Attributes:
        score: see `Scorer`.
        suffix: follows the question.
        max_new_tokens: longest answer, in tokens.
    """

    score: Scorer
    suffix: str = SHORT_ANSWER
    max_new_tokens: int = 100


def anls(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below one half (DocVQA, InfoVQA).

    Biten et al. 2019 (arXiv:1907.00490), equation 1. Case is folded and runs of white space count
    as one space, as in the ICDAR scorer. That one divides by the length before this is done, which
    differs only for answers with superfluous white space.
    """
    given = _folded(prediction)
    best = max(_similarity(given, _folded(answer)) for answer in answers)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 for a number within 5% of an answer, or for the same text without regard to case (ChartQA).

    Masry et al. 2022 (arXiv:2203.10244), section 5.1, by the rules of the scorer that published
    results use (pix2struct): a number with a percent sign is a hundredth of it, so that "5" is not
    "5%"; thousands separators and units make a text of a number; an answer of zero is a text.
    """
    return float(any(_relaxed_match(prediction.strip(), answer.strip()) for answer in answers))


def exact_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 for the text of an answer, without regard to case and outer white space."""
    given = prediction.strip().lower()
    return float(any(given == answer.strip().lower() for answer in answers))


def ocrbench(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the reply contains an answer, without regard to case (Liu et al., arXiv:2305.07895)."""
    reply = _one_line(prediction).lower()
    return float(any(_one_line(answer).lower() in reply for answer in answers))


def ocrbench_formula(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """OCRBench's exception for HME100k: formulas keep their case, spaces do not count."""
    reply = _one_line(prediction).replace(" ", "")
    return float(any(_one_line(answer).replace(" ", "") in reply for answer in answers))


def multiple_choice(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the letter read from the reply is an answer; see `read_letter`."""
    return float(read_letter(prediction, choices) in answers)


def read_letter(reply: str, choices: Sequence[str]) -> str | None:
    """The letter a reply chooses, by MMMU's rules (Yue et al. 2023, arXiv:2311.16502).

    In this order: "(B)" anywhere; "B" as a word; in replies of more than five words the text of a
    choice. Of several the one that stands last. Where MMMU's scorer then draws a letter at random,
    a reply that begins with "B.", "B:" or "B)" is taken by its letter, any other is None.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    text = f" {reply} "
    letters = LETTERS[: len(choices)]
    found = _last(text, {letter: f"({letter})" for letter in letters}) or _last(
        text, {letter: f" {letter} " for letter in letters}
    )
    if found is None and len(text.split()) > SHORT_REPLY:
        lowered = {letter: choice.lower() for letter, choice in zip(letters, choices, strict=True)}
        found = _last(text.lower(), lowered)
    if found is None and reply[:1] and reply[0] in letters and reply[1:2] in (".", ":", ")"):
        found = reply[0]
    return found


def vqa(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """VQA accuracy against ten annotators; see `vqa_accuracy`."""
    return vqa_accuracy(prediction, answers)


def metrics() -> dict[str, Metric]:
    """Every metric by its name in data files and on the command line."""
    return {
        "anls": Metric(anls),
        "relaxed": Metric(relaxed_accuracy),
        "vqa": Metric(vqa, max_new_tokens=10),
        "exact": Metric(exact_match),
        "ocrbench": Metric(ocrbench),
        "ocrbench-formula": Metric(ocrbench_formula),
        "mc": Metric(multiple_choice, LETTER_ANSWER, max_new_tokens=10),
    }


def edit_distance(left: str, right: str) -> int:
    """Fewest insertions, deletions and substitutions of characters (Levenshtein 1966)."""
    row = list(range(len(right) + 1))
    for above, first in enumerate(left, start=1):
        diagonal, row[0] = row[0], above
        for column, second in enumerate(right, start=1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (first != second)),
            )
    return row[-1]


def _similarity(left: str, right: str) -> float:
    longest = max(len(left), len(right))
    return 1 - edit_distance(left, right) / longest if longest else 1.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _relaxed_match(prediction: str, answer: str) -> bool:
    given, expected = _number(prediction), _number(answer)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _last(text: str, wanted: dict[str, str]) -> str | None:
    """The key whose value stands last in the text; of equals the first key."""
    places = {key: text.rfind(value) for key, value in wanted.items()}
    best = max(places, key=lambda key: places[key], default=None)
    return best if best is not None and places[best] >= 0 else None
