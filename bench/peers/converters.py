"""From the official layouts of the datasets to the format of `datasets`.

Each converter reads what the dataset's authors distribute and yields one entry per question that
has answers; images stay where they are and are named relative to the output.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.bench.answers.datasets import load_dataset
from internvl_edge.bench.answers.metrics import LETTERS
from internvl_edge.bundle.errors import DataError
from internvl_edge.bundle.files import DATA_BYTES, read_bytes
from internvl_edge.bundle.json_reader import JsonError, parse_json, read_json
from internvl_edge.bundle.quoting import named, quoted, reason

Entries = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """A dataset's official layout.

    Attributes:
        source: what to give as SOURCE.
        images: where its images are, relative to the folder of SOURCE (or to SOURCE, a folder).
        read: SOURCE -> entries whose images are relative to `images`.
    """

    source: str
    images: str
    read: Callable[[Path], Entries]


def layouts() -> dict[str, Layout]:
    """Every layout by the name of its dataset."""
    return {
        "docvqa": Layout("val_v1.0.json beside documents/", ".", _docvqa),
        "infovqa": Layout(
            "infographicsVQA_val_v1.0_withQT.json beside infographicsvqa_images/",
            "infographicsvqa_images",
            _infovqa,
        ),
        "chartqa": Layout("test_human.json or test_augmented.json beside png/", "png", _chartqa),
        "textvqa": Layout("TextVQA_0.5.1_val.json beside train_images/", "train_images", _textvqa),
        "ocrbench": Layout("OCRBench.json beside OCRBench_Images/", "OCRBench_Images", _ocrbench),
        "ai2d": Layout("the folder ai2d of questions/, images/, abc_images/", ".", _ai2d),
        "mmmu": Layout("the rows as .json or .jsonl, image_1... being file names", ".", _mmmu),
        "mathvista": Layout("testmini.json beside images/", ".", _mathvista),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("kind", choices=tuple(layouts()))
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder, as released")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where its images are instead")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print how many questions there are; returns the exit status."""
    count = convert(arguments.kind, arguments.source, arguments.output, arguments.images)
    print(f"wrote {count} questions to {arguments.output}")
    return 0


def convert(kind: str, source: Path, output: Path, images: Path | None = None) -> int:
    """Convert a dataset; returns the number of questions.

    Args:
        kind: a key of `layouts`.
        source: see `Layout.source`.
        output: .jsonl file to write.
        images: folder of the images, where it is not where the official layout has it.

    Raises:
        DataError: the source is not of that layout, or has no question with an answer.
    """
    layout = layouts()[kind]
    folder = images or (source if source.is_dir() else source.parent) / layout.images
    try:
        entries = [_relocated(entry, folder, output.parent) for entry in layout.read(source)]
        lines = [json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries]
    except (OSError, UnicodeDecodeError, JsonError) as error:
        raise DataError(f"cannot read {named(source)} as {kind}: {reason(error)}") from error
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{named(source)} is not in {kind}'s layout ({layout.source}):"
            f" {type(error).__name__} {reason(error)}"
        ) from error
    if not lines:
        raise DataError(
            f"{named(source)} has no question with an answer; test sets often have none"
        )
    return _write_checked(output, b"".join(lines))


def _write_checked(output: Path, content: bytes) -> int:
    """Write what the evaluation would accept, or nothing."""
    draft = output.with_name(f"{output.name}.{secrets.token_hex(4)}.draft")
    try:
        draft.write_bytes(content)
        count = len(load_dataset(draft).questions)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _relocated(entry: dict[str, Any], folder: Path, base: Path) -> dict[str, Any]:
    paths = [os.path.relpath(folder / name, base) for name in entry.pop("images")]
    return {**entry, "image": paths[0]} if len(paths) == 1 else {**entry, "images": paths}


def _entry(
    identity: object, images: Sequence[str], question: str, answers: Sequence[str], metric: str
) -> dict[str, Any]:
    return {
        "id": str(identity),
        "question": question,
        "answers": list(answers),
        "metric": metric,
        "images": list(images),
    }


def _json(source: Path) -> Any:
    return read_json(source, DATA_BYTES)


def _text(source: Path) -> str:
    return read_bytes(source, DATA_BYTES).decode("utf-8-sig")


def _docvqa(source: Path) -> Entries:
    for row in _json(source)["data"]:
        if row.get("answers"):
            image = row["image"]
            yield _entry(row["questionId"], [image], row["question"], row["answers"], "anls")


def _infovqa(source: Path) -> Entries:
    for row in _json(source)["data"]:
        if row.get("answers"):
            image = row["image_local_name"]
            yield _entry(row["questionId"], [image], row["question"], row["answers"], "anls")


def _chartqa(source: Path) -> Entries:
    for number, row in enumerate(_json(source)):  # the questions have no numbers of their own
        identity = f"{source.stem}-{number}"
        yield _entry(identity, [row["imgname"]], row["query"], [row["label"]], "relaxed")


def _textvqa(source: Path) -> Entries:
    for row in _json(source)["data"]:
        if row.get("answers"):
            image = f"{row['image_id']}.jpg"
            yield _entry(row["question_id"], [image], row["question"], row["answers"], "vqa")


def _ocrbench(source: Path) -> Entries:
    for number, row in enumerate(_json(source)):
        answers = row["answers"] if isinstance(row["answers"], list) else [str(row["answers"])]
        metric = "ocrbench-formula" if row["dataset_name"] == "HME100k" else "ocrbench"
        yield _entry(row.get("id", number), [row["image_path"]], row["question"], answers, metric)


def _ai2d(source: Path) -> Entries:
    """Of the test pictures where their list is there. Questions about letters have own pictures."""
    listed = source / "ai2d_test_ids.csv"
    tested = set(_text(listed).split()) if listed.exists() else None
    for file in sorted((source / "questions").glob("*.json")):
        if tested is not None and file.name.split(".")[0] not in tested:
            continue
        content = _json(file)
        for text, row in content["questions"].items():
            folder = "abc_images" if row.get("abcLabel") else "images"
            image = f"{folder}/{content['imageName']}"
            answer = LETTERS[int(row["correctAnswer"])]
            entry = _entry(row["questionId"], [image], text, [answer], "mc")
            yield entry | {"choices": [str(choice) for choice in row["answerTexts"]]}


def _mmmu(source: Path) -> Entries:
    """Open questions are scored by exact match, which is stricter than MMMU's own parsing."""
    text = _text(source)
    lines = filter(str.strip, text.split("\n"))
    rows = parse_json(text) if text.lstrip().startswith("[") else map(parse_json, lines)
    for row in rows:
        if row["answer"] in ("", "?"):  # as the test split has it
            continue
        images = [row[f"image_{n}"] for n in range(1, 8) if row.get(f"image_{n}")]
        if row.get("question_type", "multiple-choice") == "multiple-choice":
            entry = _entry(row["id"], images, row["question"], [row["answer"]], "mc")
            yield entry | {"choices": _list(row["options"])}
        else:
            yield _entry(row["id"], images, row["question"], _list(row["answer"]), "exact")


def _list(value: object) -> list[str]:
    """A list, or one written as Python writes it, or a single text."""
    if isinstance(value, str):
        value = ast.literal_eval(value) if value.startswith("[") else [value]
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {quoted(value)}")
    return [str(item) for item in value]


def _mathvista(source: Path) -> Entries:
    """Numbers are scored by exact match: MathVista's own scorer asks a language model for them."""
    for identity, row in _json(source).items():
        answer = row.get("answer")
        if answer in (None, ""):
            continue
        if row["question_type"] == "multi_choice":
            choices = [str(choice) for choice in row["choices"]]
            letter = LETTERS[choices.index(str(answer))]
            entry = _entry(identity, [row["image"]], row["question"], [letter], "mc")
            yield entry | {"choices": choices}
        else:
            unit = f" (unit: {row['unit']})" if row.get("unit") else ""
            yield _entry(identity, [row["image"]], row["question"] + unit, [str(answer)], "exact")
