"""Converters, on one or two questions in each dataset's official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.bench.answers.datasets import DataError, Question, load_dataset
from internvl_edge.bench.peers.converters import convert, layouts
from internvl_edge.cli.main import main

TEN = ["nokia"] * 7 + ["Nokia", "toshiba", "phone"]

#: By dataset: the file given as SOURCE, its content, the images beside it.
FILES: dict[str, tuple[str, Any, list[str]]] = {
    "docvqa": (
        "val_v1.0.json",
        {
            "dataset_name": "docvqa",
            "data": [
                {
                    "questionId": 49153,
                    "question": "What is the date?",
                    "image": "documents/x_1.png",
                    "docId": 1,
                    "answers": ["4/14/1999"],
                    "data_split": "val",
                }
            ],
        },
        ["documents/x_1.png"],
    ),
    "infovqa": (
        "infographicsVQA_val_v1.0_withQT.json",
        {
            "data": [
                {
                    "questionId": 98313,
                    "question": "How many?",
                    "image_local_name": "20471.jpeg",
                    "answers": ["12", "twelve"],
                }
            ]
        },
        ["infographicsvqa_images/20471.jpeg"],
    ),
    "chartqa": (
        "test_human.json",
        [
            {"imgname": "41.png", "query": "How many bars?", "label": "3"},
            {"imgname": "41.png", "query": "Highest?", "label": "58%"},
        ],
        ["png/41.png"],
    ),
    "textvqa": (
        "TextVQA_0.5.1_val.json",
        {
            "data": [
                {"question_id": 34602, "image_id": "0054", "question": "Brand?", "answers": TEN},
                {"question_id": 34603, "image_id": "0054", "question": "No answers?"},
            ]
        },
        ["train_images/0054.jpg"],
    ),
    "ocrbench": (
        "OCRBench.json",
        [
            {
                "dataset_name": "IIIT5K",
                "id": 0,
                "question": "what is written in the image?",
                "answers": ["CENTRE"],
                "type": "Regular Text Recognition",
                "image_path": "IIIT5K/1.png",
            },
            {
                "dataset_name": "HME100k",
                "id": 1,
                "question": "Formula?",
                "answers": "x ^ 2",
                "type": "Handwritten Mathematical Expression Recognition",
                "image_path": "HME/2.jpg",
            },
        ],
        ["OCRBench_Images/IIIT5K/1.png", "OCRBench_Images/HME/2.jpg"],
    ),
    "mmmu": (
        "rows.jsonl",
        [
            {
                "id": "validation_Art_1",
                "question": "<image 1> and <image 2>?",
                "options": "['Dada', \"l'art\"]",
                "answer": "B",
                "question_type": "multiple-choice",
                "image_1": "1.png",
                "image_2": "2.png",
                "image_3": None,
            },
            {
                "id": "validation_Art_2",
                "question": "<image 1>: how much?",
                "options": "[]",
                "answer": "['12', '12.0']",
                "question_type": "open",
                "image_1": "1.png",
            },
            {"id": "test_Art_1", "question": "?", "options": "['a', 'b']", "answer": "?"},
        ],
        ["1.png", "2.png"],
    ),
    "mathvista": (
        "testmini.json",
        {
            "1": {
                "question": "How far?",
                "image": "images/1.jpg",
                "choices": None,
                "unit": "m",
                "precision": 1.0,
                "answer": "1.2",
                "question_type": "free_form",
                "answer_type": "float",
            },
            "2": {
                "question": "Larger?",
                "image": "images/1.jpg",
                "choices": ["yes", "no"],
                "unit": None,
                "answer": "no",
                "question_type": "multi_choice",
                "answer_type": "text",
            },
        },
        ["images/1.jpg"],
    ),
}


def lay_out(folder: Path, kind: str) -> Path:
    name, content, images = FILES[kind]
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).touch()
    lines = content if name.endswith(".jsonl") else [content]
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return folder / name


def converted(folder: Path, kind: str) -> list[Question]:
    output = folder / "elsewhere" / "out.jsonl"
    output.parent.mkdir(exist_ok=True)
    count = convert(kind, lay_out(folder, kind), output)
    questions = load_dataset(output).questions
    assert count == len(questions)
    assert all(image.exists() for question in questions for image in question.images)
    return list(questions)


def test_command_line_knows_the_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "accuracy", "convert", "--help"])
    assert f"{{{','.join(layouts())}}}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "identity", "metric", "answers"),
    [
        ("docvqa", "49153", "anls", ("4/14/1999",)),
        ("infovqa", "98313", "anls", ("12", "twelve")),
        ("textvqa", "34602", "vqa", tuple(TEN)),
    ],
)
def test_one_question(
    tmp_path: Path, kind: str, identity: str, metric: str, answers: tuple[str, ...]
) -> None:
    (question,) = converted(tmp_path, kind)
    assert (question.id, question.metric, question.answers) == (identity, metric, answers)
    assert len(question.images) == 1


def test_chartqa(tmp_path: Path) -> None:
    bars, highest = converted(tmp_path, "chartqa")
    assert (bars.id, highest.id) == ("test_human-0", "test_human-1")
    assert highest.metric == "relaxed"
    assert highest.score("0.6") == 1


def test_ocrbench(tmp_path: Path) -> None:
    word, formula = converted(tmp_path, "ocrbench")
    assert (word.metric, formula.metric) == ("ocrbench", "ocrbench-formula")
    assert formula.score("It is x^2.") == 1


def test_mmmu(tmp_path: Path) -> None:
    choice, number = converted(tmp_path, "mmmu")
    assert choice.choices == ("Dada", "l'art")
    assert len(choice.images) == 2
    assert choice.score("B") == 1
    assert (number.metric, number.answers) == ("exact", ("12", "12.0"))


def test_mathvista(tmp_path: Path) -> None:
    number, choice = converted(tmp_path, "mathvista")
    assert number.text == "How far? (unit: m)"
    assert (choice.metric, choice.answers) == ("mc", ("B",))


def test_ai2d(tmp_path: Path) -> None:
    source = tmp_path / "ai2d"
    for folder in ("questions", "images", "abc_images"):
        (source / folder).mkdir(parents=True)
    for number in (0, 1):
        asked = {"answerTexts": ["ear", "nose"], "correctAnswer": 1, "questionId": f"{number}-0"}
        content = {
            "imageName": f"{number}.png",
            "questions": {"What is A?": asked | {"abcLabel": number == 0}},
        }
        (source / "questions" / f"{number}.png.json").write_text(json.dumps(content))
        (source / "images" / f"{number}.png").touch()
        (source / "abc_images" / f"{number}.png").touch()
    output = tmp_path / "ai2d.jsonl"
    assert convert("ai2d", source, output) == 2
    labelled, plain = load_dataset(output).questions
    assert labelled.images[0].parent.name == "abc_images"
    assert plain.images[0].parent.name == "images"
    assert (plain.answers, plain.choices) == (("B",), ("ear", "nose"))
    (source / "ai2d_test_ids.csv").write_text("1\n")
    assert convert("ai2d", source, output) == 1


@pytest.mark.parametrize("kind", sorted(FILES))
@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", "[3]", '{"data": [{"answers": ["a"]}]}', None]
)
def test_another_layout_is_refused(tmp_path: Path, kind: str, content: str | None) -> None:
    source, output = tmp_path / "source.json", tmp_path / "out.jsonl"
    if content is not None:
        source.write_text(content)
    with pytest.raises(DataError, match=r"source\.json"):
        convert(kind, source, output)
    assert not output.exists()
    assert not list(tmp_path.glob("*.draft"))


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    """JSON can write what no text holds."""
    source = lay_out(tmp_path, "chartqa")
    source.write_text(json.dumps([{"imgname": "41.png", "query": "\ud800", "label": "3"}]))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        convert("chartqa", source, tmp_path / "out.jsonl")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = lay_out(tmp_path, "chartqa"), tmp_path / "chartqa.jsonl"
    images = tmp_path / "moved"
    (tmp_path / "png").rename(images)
    words = ["bench", "accuracy", "convert", "chartqa", str(source), "-o", str(output)]
    assert main(words) == 2  # no image where the official layout has them
    assert main([*words, "--images", str(images)]) == 0
    assert "wrote 2 questions" in capsys.readouterr().out
    assert load_dataset(output).questions[0].images[0].exists()


def test_a_file_beside_the_output_is_kept(tmp_path: Path) -> None:
    """Whatever it is called: a draft once was."""
    source, output = lay_out(tmp_path, "chartqa"), tmp_path / "out.jsonl"
    mine = tmp_path / "out.jsonl.draft"
    mine.write_text("mine")
    convert("chartqa", source, output)
    assert mine.read_text() == "mine"
