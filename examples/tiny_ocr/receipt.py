"""Draw the demonstration picture: a held-out receipt of 3 x 2 tiles and two questions about it."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from internvl_edge.examples.tiny_ocr.data import FULL, HELD_OUT, scene
from internvl_edge.examples.tiny_ocr.evaluate import greedy
from internvl_edge.examples.tiny_ocr.model import Prompts, image_rows, tiles_of
from internvl_edge.examples.tiny_ocr.reference import load_checkpoint

LEVEL = replace(FULL, tiles=(6,), least=7)
GRID = (3, 2)
ASKED = ("TOTAL", "DATE")  # the keys of the two turns


def draw(offset: int, directory: Path) -> tuple[tuple[str, str], ...]:
    """Write receipt.png and receipt.json of one held-out seed; returns the two turns."""
    drawn = scene(HELD_OUT + offset, LEVEL)
    fields = dict(drawn.fields)
    turns = tuple((f"What is the {key}?", fields[key]) for key in ASKED)
    drawn.image.save(directory / "receipt.png", optimize=True)
    record = {
        "image": "receipt.png",
        "seed": f"HELD_OUT + {offset}",
        "grid": list(drawn.grid),
        "fields": fields,
        "turns": [{"question": question, "answer": answer} for question, answer in turns],
    }
    (directory / "receipt.json").write_text(json.dumps(record, indent=2) + "\n")
    return turns


@torch.inference_mode()
def read(checkpoint: Path, picture: Path, turns: tuple[tuple[str, str], ...]) -> list[str]:
    """The model's answers in one conversation about the picture."""
    model, prompts = load_checkpoint(checkpoint), Prompts()
    image = Image.open(picture).convert("RGB")
    rows = image_rows(model, torch.tensor(tiles_of(image))).flatten(0, 1)[None]
    said: list[str] = []
    tail: list[int] = []
    for question, _ in turns:
        tail += prompts.question(question, not said)
        said += greedy(model, prompts, rows, [tail])
        tail += prompts.answer(said[-1])
    return said


def find(start: int) -> int:
    """The next offset whose receipt has the wanted grid and all keys that will be asked for."""
    for offset in itertools.count(start):
        drawn = scene(HELD_OUT + offset, LEVEL)
        if (
            drawn.grid == GRID
            and len(drawn.fields) >= 7
            and dict(drawn.fields).keys() >= set(ASKED)
        ):
            return offset
    raise AssertionError("unreachable")


def main() -> None:
    """Command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=int, default=5_000_055, help="first offset to consider")
    parser.add_argument("--checkpoint", type=Path, default=here / "checkpoint")
    parser.add_argument("--directory", type=Path, default=here)
    args = parser.parse_args()
    turns = draw(find(args.start), args.directory)
    said = read(args.checkpoint, args.directory / "receipt.png", turns)
    for (question, answer), text in zip(turns, said, strict=True):
        print(f"{question} expected {answer!r}, said {text!r}")


if __name__ == "__main__":
    main()
