"""Evaluation data: what a line may say, and what is refused with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvl_edge.bench.answers.datasets import DataError, load_dataset

LINE: dict[str, Any] = {"id": "q1", "image": "a.png", "question": "What?", "answers": ["4"]}
CHOICES = {"metric": "mc", "choices": ["red", "blue"]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
)


def write(folder: Path, *lines: Any) -> Path:
    (folder / "a.png").touch()
    path = folder / "data.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_a_file(tmp_path: Path) -> None:
    second = {"id": 2, "images": [], "question": "Q", "answers": ["blue"], **CHOICES}
    dataset = load_dataset(write(tmp_path, LINE, "", second), "anls")
    first, other = dataset.questions
    assert (first.id, first.images, first.metric) == ("q1", (tmp_path / "a.png",), "anls")
    assert first.prompt() == "What? Answer the question using a single word or phrase."
    assert first.prompt("Now.") == "What? Now."
    assert first.prompt("") == "What?"
    assert (other.id, other.images, other.answers) == ("2", (), ("B",))
    assert other.prompt() == (
        "Q\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert other.score("(B)") == 1
    assert first.score("4") == 1


def test_a_letter_is_itself_where_it_is_a_choice_too(tmp_path: Path) -> None:
    line = LINE | {"metric": "mc", "choices": ["B", "A"], "answers": ["A"]}
    assert load_dataset(write(tmp_path, line)).questions[0].answers == ("A",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "'id'"),
        ({"id": True}, "'id'"),
        ({"id": ""}, "'id'"),
        ({"question": " "}, "'question'"),
        ({"answers": []}, "'answers' is empty"),
        ({"answers": "4"}, "list of texts"),
        ({"answers": [4]}, "list of texts"),
        ({"images": ["b.png"]}, "either 'image' or 'images'"),
        ({"image": 3}, "list of texts"),
        ({"metric": "bleu"}, "unknown metric 'bleu'"),
        ({"metric": ["anls"]}, "unknown metric"),
        ({"question": "\ud800"}, "not JSON"),
        ({"metric": "vqa"}, "10 annotators"),
        ({"metric": "mc"}, "0 entries, expected 2 to 26"),
        ({"choices": ["a", "b"]}, "'choices' is for the metric mc"),
        ({**CHOICES, "answers": ["C"]}, "neither a letter up to B"),
        ({"answer": "4"}, "unknown field 'answer'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, LINE, {**LINE, "id": "q2", **change})
    with pytest.raises(DataError, match=message) as error:
        load_dataset(path, "exact")
    assert f"{path}:2: " in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE, LINE], ":2: the id 'q1' stands in an earlier line"),
        ([LINE, LINE | {"id": "2"}, '{"id": '], ":3: not JSON"),
        ([LINE, "[1]"], ":2: expected an object, got list"),
        (["[" * 100_000], ":1: not JSON"),
        ([], "no lines"),
        ([LINE | {"image": "b.png"}], "none of the 1 images"),
    ],
)
def test_a_bad_file(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(write(tmp_path, *lines), "exact")


def test_no_metric(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--metric"):
        load_dataset(write(tmp_path, LINE))


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_an_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(path, "exact")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*LINE, "images", "choices", "metric"]), JSON))
def test_anything_else_is_one_error(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path, LINE | change)
    try:
        (question,) = load_dataset(path, "exact").questions
    except DataError as error:
        message = str(error)
    else:
        message = str(path)
        assert 0 <= question.score("4") <= 1
    assert str(path) in message
