"""How far a quantised bundle is from its float parent, token by token.

    internvl-edge bench accuracy fidelity BUNDLE --reference FLOAT_BUNDLE [--data FILE.jsonl] ...

Both read the same prompt and the same answer (the parent's own greedy one, or the data's), and
their next-token distributions are compared at every token of the answer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.answers.accuracy import held_out
from internvl_edge.bench.answers.datasets import load_dataset
from internvl_edge.bench.answers.evaluation import Engine
from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.bench.common.intervals import Estimate
from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bundle.errors import BundleError, DataError, ImageError, LimitError, PromptError
from internvl_edge.bundle.quoting import named
from internvl_edge.export.progress import progress_bar
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.images.sources import ImageLike
from internvl_edge.runtime.options import add_device, at_least, filled

Answers = Literal["greedy", "given"]

#: Rows of logits turned to float64 at once: 47 MB at 92,553 tokens.
ROWS = 64


@dataclass(frozen=True)
class Item:
    """A question about images, and an answer to it."""

    images: Sequence[ImageLike]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Tokens:
    """Measures at each token of an answer, `(tokens,)` each.

    Attributes:
        divergence: Kullback-Leibler divergence KL(reference || bundle) in nats.
        agrees: both have the same likeliest token.
        reference_loss: negative log-likelihood of the answer's token under the reference, in nats.
        loss: the same under the bundle.
    """

    divergence: NDArray[np.float64]
    agrees: NDArray[np.bool_]
    reference_loss: NDArray[np.float64]
    loss: NDArray[np.float64]

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """All tokens of several parts."""
        return cls(
            np.concatenate([part.divergence for part in parts]),
            np.concatenate([part.agrees for part in parts]),
            np.concatenate([part.reference_loss for part in parts]),
            np.concatenate([part.loss for part in parts]),
        )


@dataclass(frozen=True)
class Fidelity:
    """The comparison over all answers; divergences in nats a token."""

    questions: int
    tokens: int
    divergence_mean: float
    divergence_median: float
    divergence_99: float
    divergence_max: float
    agreement: Estimate
    reference_perplexity: float
    perplexity: float

    @classmethod
    def of(cls, answers: Sequence[Tokens]) -> Fidelity:
        """Summarise; one entry per answer."""
        every = Tokens.join(answers)
        median, high, most = np.quantile(every.divergence, [0.5, 0.99, 1])
        return cls(
            questions=len(answers),
            tokens=len(every.loss),
            divergence_mean=float(every.divergence.mean()),
            divergence_median=float(median),
            divergence_99=float(high),
            divergence_max=float(most),
            agreement=Estimate.of(every.agrees.astype(float).tolist()),
            reference_perplexity=float(np.exp(every.reference_loss.mean())),
            perplexity=float(np.exp(every.loss.mean())),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="FLOAT_BUNDLE", help="its float parent"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help="questions as for `bench accuracy` (default: tiny_ocr pictures)",
    )
    parser.add_argument(
        "--images", type=at_least(1, "--images"), default=50, help="tiny_ocr pictures"
    )
    parser.add_argument(
        "--answers",
        choices=get_args(Answers),
        default="greedy",
        help="read along the reference's own answers, or the data's",
    )
    parser.add_argument("--suffix", help="follows every question, instead of the metric's own")
    parser.add_argument(
        "--max-new-tokens",
        type=at_least(1, "--max-new-tokens"),
        default=100,
        help="of a greedy answer",
    )
    parser.add_argument("--max-tiles", type=int, help="most tiles per image, without thumbnail")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, and write the report; returns the exit status.

    Raises:
        BundleError: the bundles are not of one model.
        DataError: the data cannot be used, or not one of its questions.
        OutputError: the report cannot be written.
    """
    bundle, reference, data = arguments.bundle, arguments.reference, arguments.data
    answers, max_tiles = arguments.answers, arguments.max_tiles
    engine = filled(Engine, arguments)
    check_writable(arguments.json)
    items = _tiny_ocr(arguments.images) if data is None else _items(data, arguments.suffix)
    parent = InternVL.load(reference, device=engine.device, threads=engine.threads)
    model = InternVL.load(bundle, device=engine.device, threads=engine.threads)
    if parent.spec != model.spec:
        raise BundleError(
            f"{named(bundle)} and {named(reference)} are not of the same model; nothing to compare"
        )
    compared, failures = [], []
    with progress_bar("compare", unit="question") as start:
        advance = start(len(items))
        for item in items:
            try:
                ids, first = answered(parent, item, answers, arguments.max_new_tokens, max_tiles)
                compared.append(compare(parent, model, ids, first, item.images, max_tiles))
            except (ImageError, PromptError, LimitError) as error:
                failures.append(str(error))
            advance(1)
    if not compared:
        raise DataError(f"none of {len(items)} questions could be asked: {failures[0]}")
    result = Fidelity.of(compared)
    print("\n".join(_lines(result, failures)))
    if arguments.json is not None:
        machine = describe_machine(engine.threads or 0)
        found = {**asdict(result), "answers": answers, "failures": failures, "machine": machine}
        write_result(found, arguments.json)
    return 0


def answered(
    parent: InternVL, item: Item, answers: Answers, max_new_tokens: int, max_tiles: int | None
) -> tuple[list[int], int]:
    """Token ids of the prompt and its answer, and where the answer begins.

    A greedy answer ends before an image slot, should the parent generate one: it cannot be read.

    Raises:
        PromptError: nothing is left of the answer.
    """
    tiled = [parent.tile_with_identity(image, max_tiles) for image in item.images]
    question = parent.inputs.question(item.prompt, len(tiled), earlier_images=0)
    prompt = parent.encode_conversation([(question, None)], tiled, None)
    if answers == "greedy":
        reply = parent.generate(
            prompt,
            item.images,
            max_new_tokens=max_new_tokens,
            max_tiles=max_tiles,
            sampling=ONE_BY_ONE,
        )
        slot = parent.context_id
        text = list(itertools.takewhile(lambda token: token != slot, reply.token_ids))
        if not text:
            raise PromptError("the reference answers with an image slot; nothing to compare")
        return prompt + text, len(prompt)
    whole = parent.encode_conversation([(question, item.answer)], tiled, None)
    pairs = zip(prompt, whole, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return whole, shared


def compare(
    parent: InternVL,
    model: InternVL,
    ids: Sequence[int],
    first: int,
    images: Sequence[ImageLike],
    max_tiles: int | None = None,
) -> Tokens:
    """Run both over the same tokens and compare them from token `first` on.

    No more logits are held than one pass of prefill of each.
    """
    # The logits of a position are about the token after it.
    arguments = (ids[:-1], images, max_tiles)
    pieces = zip(
        parent.logit_chunks(*arguments, start=first - 1),
        model.logit_chunks(*arguments, start=first - 1),
        strict=True,
    )
    parts, at = [], first
    for expected, actual in pieces:
        for start in range(0, len(expected), ROWS):
            targets = np.asarray(ids[at : at + len(expected[start : start + ROWS])])
            block = slice(start, start + ROWS)
            parts.append(compare_logits(expected[block], actual[block], targets))
            at += len(targets)
    return Tokens.join(parts)


def compare_logits(
    expected: NDArray[np.float32], actual: NDArray[np.float32], targets: NDArray[np.int64]
) -> Tokens:
    """Compare rows of logits `(tokens, vocab)`; `targets` `(tokens,)` are the tokens that follow.

    KL(p || q) = sum p (log p - log q), in float64.
    """
    log_p, log_q = log_softmax(expected), log_softmax(actual)
    rows = np.arange(len(targets))
    return Tokens(
        divergence=(np.exp(log_p) * (log_p - log_q)).sum(axis=1).clip(min=0),
        agrees=log_p.argmax(axis=1) == log_q.argmax(axis=1),
        reference_loss=-log_p[rows, targets],
        loss=-log_q[rows, targets],
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of probabilities, row by row."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _items(data: Path, suffix: str | None) -> list[Item]:
    # A line without a metric asks for a short answer; nothing is scored here.
    questions = load_dataset(data, metric="exact").questions
    return [Item(each.images, each.prompt(suffix), each.answers[0]) for each in questions]


def _tiny_ocr(images: int) -> list[Item]:
    return [
        Item([question.image], prompt, answer)
        for question in held_out(images)
        for prompt, answer in question.turns[:1]
    ]


def _lines(result: Fidelity, failures: Sequence[str]) -> Iterator[str]:
    agreement = result.agreement
    yield f"questions           {result.questions} ({result.tokens} tokens of answers)"
    yield (
        f"KL divergence       {result.divergence_mean:.3g} nats a token (median"
        f" {result.divergence_median:.3g}, 99th percentile {result.divergence_99:.3g},"
        f" most {result.divergence_max:.3g})"
    )
    yield (
        f"top-1 agreement     {100 * agreement.mean:.2f}% of tokens"
        f" ({100 * agreement.low:.2f} to {100 * agreement.high:.2f})"
    )
    exact = result.reference_perplexity
    yield f"perplexity          {result.perplexity:.4f}, reference {exact:.4f}"
    if failures:
        yield f"failed              {len(failures)}, first: {failures[0]}"
