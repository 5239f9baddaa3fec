"""VQA accuracy: agreement with ten annotators after the evaluation server's normalisation.

The rules are those of EvalAI's answer processor, which scores TextVQA (Singh et al. 2019,
arXiv:1904.08920), and of the consensus score of VQA (Antol et al. 2015, arXiv:1505.00468).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

#: Answers per question in VQA, TextVQA and VizWiz.
ANNOTATORS = 10
#: Annotators who must agree with an answer for it to be fully right.
CONSENSUS = 3

NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
NUMBERS = {word: str(value) for value, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
#: Each is deleted where it touches a space anywhere in the text, else it becomes one.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
#: A full stop that no digit follows. The server deletes at most this many of them.
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_FULL_STOPS = 32

#: Spellings that get their apostrophe back when one is left out. Those whose bare form is another
#: word (she'll, we're, it's) are not among them.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, others who gave this answer / 3), each left out once.

    Args:
        prediction: the model's answer, as it stands.
        answers: one per annotator, `ANNOTATORS` of them.
    """
    given = normalise_answer(prediction)
    matching = sum(normalise_answer(answer) == given for answer in answers)
    left_in = min(1.0, matching / CONSENSUS)
    left_out = min(1.0, max(matching - 1, 0) / CONSENSUS)
    return (matching * left_out + (len(answers) - matching) * left_in) / len(answers)


def normalise_answer(text: str) -> str:
    """Lower case, numbers as digits, no articles, no punctuation, contractions spelt out."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    kept = text
    for mark in PUNCTUATION:
        by_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if by_space else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", kept, MOST_FULL_STOPS).split()]
    spelt = _contractions()
    return " ".join(spelt.get(word, word) for word in words if word not in ARTICLES)


@cache
def _contractions() -> Mapping[str, str]:
    """Each contraction by its spellings with one apostrophe left out."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in CONTRACTIONS.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }
