"""What quantisation costs in answers: exact match on held-out tiny_ocr pictures, per precision.

    internvl-edge bench accuracy [--images N] [--only NAME ...] [--peers] [--json FILE]

Every precision is exported from the same checkpoint, calibrated with pictures of training seeds,
and asked two questions about each held-out picture in one conversation. Beside each quantised
one stands plain round to nearest, so that what calibration buys is seen. Every row is compared
with fp32, question by question. The files written for TensorRT are run by ONNX Runtime's CPU
kernels: what an engine should answer. With --peers, rows of llama.cpp follow: float vision, its own
quantisers on the same language weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.bench.common.intervals import Comparison, Estimate
from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.peers.answers import NAMES as LLAMA_CPP
from internvl_edge.bench.peers.answers import absent, llamacpp_models
from internvl_edge.bundle.contract import DIALECTS, DialectName
from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.manifest import read_manifest
from internvl_edge.bundle.quoting import quoted
from internvl_edge.examples.tiny_ocr.data import HELD_OUT, sample
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime import InternVL

#: The tiny model's matrices have 128 to 768 columns: a block of 128 would be a whole row.
BLOCK = 32
TURNS = 2
CALIBRATION_PICTURES = 48
LONGEST_ANSWER = 96


@dataclass(frozen=True)
class Case:
    """One precision of the model."""

    name: str
    vision: Any = "fp32"
    language: Any = "fp32"
    kv: Any = None
    block: int = BLOCK
    dialect: DialectName = "onnxruntime"
    head_bits: Literal[4, 8] = 8

    @property
    def has_naive(self) -> bool:
        """Tell whether rounding to nearest is measured too: once for each quantised precision."""
        integers = self.vision == "int8" or self.language in ("int8", "int4")
        return integers and not DIALECTS[self.dialect].engines


#: The row that the others are compared with; it stands first.
FLOAT = "fp32"
CASES = (
    Case(FLOAT),
    Case("fp32 + kv16", kv="fp16"),
    Case("fp32 + kv8", kv="int8"),
    Case("fp16", "fp16", "fp16"),
    Case("fp16 + kv8", "fp16", "fp16", "int8"),
    Case("int8 + int8", "int8", "int8"),
    Case("int8 + int8 + kv16", "int8", "int8", "fp16"),
    Case("int8 + int8 + kv8", "int8", "int8", "int8"),
    Case("int8 + int4", "int8", "int4"),
    Case("int8 + int4 + kv16", "int8", "int4", "fp16"),
    Case("int8 + int4 + kv8", "int8", "int4", "int8"),
    Case("int8 + int4, 4-bit head", "int8", "int4", head_bits=4),
    Case("int8 + int4, 4-bit head, block 256", "int8", "int4", None, 256, head_bits=4),
    Case("int8 + int4, block 128", "int8", "int4", None, 128),
    Case("int8 + int4 + kv8, block 128", "int8", "int4", "int8", 128),
    Case("fp16, tensorrt", "fp16", "fp16", dialect="tensorrt"),
    Case("int8 + int8, tensorrt", "int8", "int8", dialect="tensorrt"),
    Case("int8 + int4, tensorrt", "int8", "int4", None, 128, "tensorrt"),
    Case("int8 + int4 + kv8, portable", "int8", "int4", "int8", 128, "tensorrt-portable"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        megabytes: the bundle's size.
        score: share of answers that equal what is written, to the letter.
        right: number of these.
        against_float: change from the table's fp32 row; None where that is this row or absent.
        naive: the score of rounding to nearest, where the row is quantised.
    """

    name: str
    megabytes: float
    score: Estimate
    right: int
    against_float: Comparison | None
    naive: Estimate | None


@dataclass(frozen=True)
class Question:
    """A picture and what it is asked in successive turns."""

    image: Image.Image
    turns: list[tuple[str, str]]


def held_out(count: int) -> Iterator[Question]:
    """Pictures of seeds that training never drew."""
    for offset in range(count):
        image, turns = sample(HELD_OUT + offset)
        yield Question(image, turns[:TURNS])


def evaluate(model: InternVL, questions: Sequence[Question]) -> list[float]:
    """Ask every question greedily; later turns see the model's own earlier answers.

    Returns:
        1.0 for each answer that is right to the letter, else 0.0, in the order of the questions.
    """
    scores = []
    for question in questions:
        chat = model.chat()
        for turn, (prompt, answer) in enumerate(question.turns):
            images = [question.image] if turn == 0 else []
            reply = chat.send(prompt, images, max_new_tokens=LONGEST_ANSWER, sampling=ONE_BY_ONE)
            scores.append(float(reply.text == answer))
    return scores


def run_accuracy(
    *, images: int, only: Sequence[str], peers: bool, threads: int | None, output: Path | None
) -> int:
    """Print the table, row by row; returns the exit status."""
    if images < 1:
        raise UsageError(f"--images is {quoted(images)}, it must be at least 1")
    known = [case.name for case in CASES] + (list(LLAMA_CPP) if peers else [])
    if unknown := set(only) - set(known):
        raise UsageError(
            f"--only {quoted(sorted(unknown)[0])} is unknown; known: {', '.join(known)}"
        )
    check_writable(output)
    checkpoint = example_room() / "checkpoint"
    questions = list(held_out(images))
    rows = []
    exact: list[float] | None = None
    print(
        f"{'vision + language':30} {'MB':>6} {'exact':>8} {'95% interval':>16} {'naive':>8}"
        f" {'lost':>5} {'gained':>6} {'McNemar p':>9}"
    )
    with scratch_folder() as folder:
        calibration = _calibration(folder / "calibration")
        for case in CASES:
            if only and case.name not in only:
                continue
            size, scores, naive = _measure(
                case, checkpoint, folder, calibration, questions, threads
            )
            rows.append(_row(case.name, size, scores, exact, naive))
            exact = scores if case.name == FLOAT else exact
            print(_line(rows[-1]), flush=True)
        if peers and (reason := absent()) is not None:
            print(f"llama.cpp: {reason}")
        elif peers:
            names = [name for name in LLAMA_CPP if not only or name in only]
            for loaded in llamacpp_models(checkpoint, folder, names, threads):
                scores = evaluate(loaded.model, questions)
                rows.append(_row(loaded.name, loaded.nbytes, scores, exact, None))
                print(_line(rows[-1]), flush=True)
    if output is not None:
        report = {
            "images": images,
            "turns": TURNS,
            "rows": [asdict(row) for row in rows],
            "machine": describe_machine(threads or 0),
        }
        write_result(report, output)
    return 0


def _row(
    name: str,
    size: int,
    scores: list[float],
    exact: list[float] | None,
    naive: list[float] | None,
) -> Row:
    return Row(
        name,
        size / 1e6,
        Estimate.of(scores),
        round(sum(scores)),
        None if exact is None else Comparison.of(exact, scores),
        None if naive is None else Estimate.of(naive),
    )


def _measure(
    case: Case,
    checkpoint: Path,
    folder: Path,
    calibration: Path,
    questions: Sequence[Question],
    threads: int | None,
) -> tuple[int, list[float], list[float] | None]:
    """Bytes of the bundle, and the scores with calibration and without (where quantised)."""
    scores = []
    size = 0
    for naive in (False, True) if case.has_naive else (False,):
        bundle = export_bundle(
            checkpoint,
            folder / "bundle",
            vision=case.vision,
            language=case.language,
            kv=case.kv,
            dialect=case.dialect,
            options=QuantOptions(block=case.block, head_bits=case.head_bits, naive=naive),
            calibration=calibration,
            sensitivity=False,
            overwrite=True,
        )
        if not naive:
            size = sum(entry.bytes for entry in read_manifest(bundle).files.values())
        model = InternVL.load(bundle, device="cpu", threads=threads, verify="size")
        scores.append(evaluate(model, questions))
    return size, scores[0], scores[1] if case.has_naive else None


def _calibration(folder: Path) -> Path:
    """Pictures of training seeds with their first question and answer."""
    folder.mkdir()
    lines = []
    for seed in range(CALIBRATION_PICTURES):
        image, turns = sample(seed)
        image.save(folder / f"{seed}.png")
        prompt, answer = turns[0]
        lines.append(json.dumps({"image": f"{seed}.png", "prompt": prompt, "answer": answer}))
    (folder / "pictures.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _line(row: Row) -> str:
    interval = f"{100 * row.score.low:.2f} to {100 * row.score.high:.2f}"
    naive = "" if row.naive is None else f"{100 * row.naive.mean:.2f}"
    line = (
        f"{row.name:30} {row.megabytes:6.2f} {100 * row.score.mean:8.2f} {interval:>16} {naive:>8}"
    )
    change = row.against_float
    if change is None:
        return line
    return f"{line} {change.lost:5} {change.gained:6} {change.p_value:9.3g}"
