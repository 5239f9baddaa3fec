"""Metrics against worked examples, RapidFuzz and the definitions they come from."""

from __future__ import annotations

import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from internvl_edge.bench.answers import metrics
from internvl_edge.bench.answers.metrics import (
    anls,
    edit_distance,
    exact_match,
    multiple_choice,
    ocrbench,
    ocrbench_formula,
    read_letter,
    relaxed_accuracy,
)
from internvl_edge.bench.answers.vqa import normalise_answer, vqa_accuracy
from internvl_edge.cli.main import main

METRICS = tuple(metrics.metrics())
TEXTS = st.text(st.sampled_from("aAbB 12.,%'é中\n"), max_size=12)
ANSWERS = st.lists(TEXTS, min_size=1, max_size=4)
WORDS = st.lists(
    st.sampled_from(
        ["a", "the", "two", "2", "dont", "don't", "cat", "cat.", "1,000", "3.5", "it's"]
    ),
    min_size=1,
    max_size=4,
).map(" ".join)


def test_command_line_knows_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "accuracy", "--help"])
    assert f"{{{','.join(METRICS)}}}" in capsys.readouterr().out


@pytest.mark.parametrize("name", METRICS)
@given(prediction=TEXTS, answers=ANSWERS)
def test_scores_are_between_zero_and_one(name: str, prediction: str, answers: list[str]) -> None:
    score = metrics.metrics()[name].score(prediction, answers, ["one", "two"])
    assert 0 <= score <= 1


@pytest.mark.parametrize("name", ["anls", "relaxed", "exact", "ocrbench", "ocrbench-formula"])
@given(prediction=TEXTS, answers=ANSWERS)
def test_more_answers_never_score_less(name: str, prediction: str, answers: list[str]) -> None:
    score = metrics.metrics()[name].score
    assert score(prediction, answers, ()) == max(score(prediction, [one], ()) for one in answers)
    assert score(prediction, answers, ()) == score(prediction, answers[::-1], ())


@pytest.mark.parametrize("name", [name for name in METRICS if name != "mc"])
@given(answer=TEXTS.filter(str.strip))
def test_the_answer_itself_is_right(name: str, answer: str) -> None:
    assert metrics.metrics()[name].score(answer, [answer] * 10, ()) == 1


class TestAnls:
    @given(left=TEXTS, right=TEXTS)
    def test_distance_is_rapidfuzz_s(self, left: str, right: str) -> None:
        assert edit_distance(left, right) == Levenshtein.distance(left, right)

    @given(left=TEXTS, right=TEXTS)
    def test_similarity_is_rapidfuzz_s_from_one_half_on(self, left: str, right: str) -> None:
        folded = [" ".join(text.lower().split()) for text in (left, right)]
        similarity = Levenshtein.normalized_similarity(*folded)
        expected = similarity if similarity >= 0.5 else 0
        assert anls(left, [right]) == pytest.approx(expected)
        assert anls(left, [right]) == anls(right, [left])

    @given(text=TEXTS, answers=ANSWERS)
    def test_case_and_white_space_do_not_count(self, text: str, answers: list[str]) -> None:
        spaced = "  " + text.replace(" ", " \t ") + "\n"
        assert anls(spaced.upper().lower(), answers) == anls(text.lower(), answers)

    @pytest.mark.parametrize(
        ("prediction", "answers", "score"),
        [
            ("4/14/1999", ["4/14/1999"], 1.0),
            ("Coca Cola", ["coca cola", "the coca cola company"], 1.0),
            ("coca coa", ["Coca  Cola"], 1 - 1 / 9),
            ("ab", ["abcd"], 0.5),  # at the threshold: counts
            ("ab", ["abcde"], 0.0),  # below it
            ("", ["yes"], 0.0),
        ],
    )
    def test_examples(self, prediction: str, answers: list[str], score: float) -> None:
        assert anls(prediction, answers) == pytest.approx(score)


class TestRelaxedAccuracy:
    @pytest.mark.parametrize(
        ("prediction", "answer", "right"),
        [
            ("105", "100", True),  # 5% is within
            ("105.1", "100", False),
            ("95", "100", True),
            ("-100", "100", False),
            ("0.051", "5%", True),  # a percentage is a hundredth
            ("5.2%", "5%", True),
            ("5", "5%", False),
            ("0", "0", True),
            ("0.0", "0", False),  # of zero there are no 5%: compared as text
            ("1,000", "1000", False),  # a separator makes it a text
            ("1,000", "1,000", True),
            ("5 kg", "5", False),
            ("5 kg", "5 KG", True),
            ("Blue", "blue ", True),
            (" Blue\n", "blue", True),
            ("nan", "nan", True),
            ("inf", "10", False),
        ],
    )
    def test_examples(self, prediction: str, answer: str, right: bool) -> None:
        assert relaxed_accuracy(prediction, [answer]) == right

    @given(
        answer=st.floats(0.01, 1e6),
        change=st.floats(-0.2, 0.2).filter(lambda change: abs(abs(change) - 0.05) > 1e-6),
        sign=st.sampled_from([1, -1]),
    )
    def test_five_percent_of_the_answer(self, answer: float, change: float, sign: int) -> None:
        prediction = sign * answer * (1 + change)
        assert relaxed_accuracy(repr(prediction), [repr(sign * answer)]) == (abs(change) < 0.05)


class TestVqaAccuracy:
    @given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("abc"))
    def test_is_the_mean_over_nines(self, answers: list[str], prediction: str) -> None:
        """The definition: of each nine annotators, three who agree make an answer right."""
        nines = itertools.combinations(answers, 9)
        expected = sum(min(1, nine.count(prediction) / 3) for nine in nines) / 10
        words = {"a": "red", "b": "green", "c": "blue"}
        named = [words[answer] for answer in answers]
        assert vqa_accuracy(words[prediction], named) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
    )
    def test_known_steps(self, agree: int, score: float) -> None:
        answers = ["yes"] * agree + [f"no {index}" for index in range(10 - agree)]
        assert vqa_accuracy("Yes.", answers) == pytest.approx(score)

    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("The cat", "cat"),
            ("two dogs", "2 dogs"),
            ("none", "0"),
            ("dont know", "don't know"),
            ("couldnt've", "couldn't've"),
            ("shell", "shell"),  # a word of its own
            ("it's", "it 's"),
            ("1,000", "1000"),
            ("3.50", "3.50"),
            ("St. John.", "st john"),
            ("stop-sign", "stop sign"),
            ("stop - sign", "stop sign"),
            ("(left", "left"),
            ("a\nb", "b"),
            ("what?", "what"),
            ("10:30", "10:30"),
        ],
    )
    def test_normalisation(self, text: str, normal: str) -> None:
        assert normalise_answer(text) == normal

    @given(WORDS)
    def test_articles_case_and_space_do_not_count(self, text: str) -> None:
        noisy = f"  the {text.upper()}\t an "
        assert normalise_answer(noisy) == normalise_answer(text)


class TestOcrbench:
    @pytest.mark.parametrize(
        ("prediction", "answer", "right"),
        [
            ("The word is CENTRE.", "centre", True),
            ("cent re", "centre", False),
            ("line one\nline two", "one line", True),
            ("", "x", False),
        ],
    )
    def test_containment(self, prediction: str, answer: str, right: bool) -> None:
        assert ocrbench(prediction, ["zzz", answer]) == right

    @pytest.mark.parametrize(
        ("prediction", "answer", "right"),
        [("It is x ^ { 2 }", "x ^ {2}", True), ("X^{2}", "x^{2}", False), ("a\nb", "ab", True)],
    )
    def test_formulas(self, prediction: str, answer: str, right: bool) -> None:
        assert ocrbench_formula(prediction, [answer]) == right

    @given(TEXTS, TEXTS.filter(str.strip), TEXTS)
    def test_the_answer_within_anything(self, before: str, answer: str, after: str) -> None:
        """Case folding of "é" and the like is the same on both sides."""
        assert ocrbench(before + answer + after, [answer.strip()]) == 1
        assert ocrbench_formula(before + answer + after, [answer]) == 1


class TestMultipleChoice:
    CHOICES = ("red apple", "green pear", "blue plum", "black grape")

    @pytest.mark.parametrize(
        ("reply", "letter"),
        [
            ("B", "B"),
            ("B.", "B"),
            ("(C)", "C"),
            ("(A) or (C)", "C"),  # the last
            ("The answer is B because of D", "D"),
            ("(B), not D", "B"),  # brackets first
            ("I would say it is the green pear here", "B"),
            ("not the red apple but the black grape", "D"),
            ("green pear", None),  # too short for its text to be looked for
            ("b", None),
            ("E", None),
            ("B. green pear", "B"),
            ("C: blue plum", "C"),
            ("D) black", "D"),
            ("", None),
            ("Because", None),
        ],
    )
    def test_letters(self, reply: str, letter: str | None) -> None:
        assert read_letter(reply, self.CHOICES) == letter

    @given(st.text(max_size=30), st.integers(2, 26))
    def test_only_letters_that_are_there(self, reply: str, count: int) -> None:
        choices = [f"choice {number}" for number in range(count)]
        assert read_letter(reply, choices) in (None, *string.ascii_uppercase[:count])

    @given(
        st.integers(0, 3), st.sampled_from(["{}", "{}.", "({})", "Answer: {}", "it is ({}), yes"])
    )
    def test_forms(self, index: int, form: str) -> None:
        letter = string.ascii_uppercase[index]
        assert read_letter(form.format(letter), self.CHOICES) == letter
        assert multiple_choice(form.format(letter), [letter], self.CHOICES) == 1
        assert multiple_choice(form.format(letter), ["Z"], self.CHOICES) == 0


def test_exact_match() -> None:
    assert exact_match(" Yes\n", ["no", "yes"]) == 1
    assert exact_match("yes.", ["yes"]) == 0
