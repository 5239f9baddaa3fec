"""What guessing ahead gives: a trained model's answers, told by a bundle at that bundle's pace.

    internvl-edge bench latency speculation BUNDLE [--answers BUNDLE] [--tokens N] [--json FILE]

Answers come from tiny_ocr, without guesses; those that are JSON were recorded from a copy of it
that was taught to write it (`bench/answers/receipts.py`). BUNDLE, whose weights may be drawn
(`bench scale`), gets their prompts and runs its own passes; its choices are replaced by these
tokens. Each answer is told with and without guesses, in turns. Passes of 1 to 16 rows are timed
before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.answers.receipts import recorded
from internvl_edge.bench.answers.repeats import SLOT, Answered, answered, within
from internvl_edge.bench.common.machine import busy_note, describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.common.summaries import percentile
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.quoting import named
from internvl_edge.runtime import InternVL, Sampling, Timings
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.decoding.speculation import Experience
from internvl_edge.runtime.options import add_threads, at_least

ROWS = (1, 2, 4, 8, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--answers", type=Path, metavar="BUNDLE", help="of tiny_ocr (default: the demo's)"
    )
    parser.add_argument(
        "--tokens", type=at_least(1, "--tokens"), default=300, help="of each kind of answer"
    )
    parser.add_argument(
        "--speculate", type=at_least(1, "--speculate"), default=Sampling.speculate, metavar="N"
    )
    parser.add_argument("--repeat", type=at_least(1, "--repeat"), default=9, help="of the passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record, tell, print; returns the exit status.

    Raises:
        BundleError: a bundle cannot be used, or guessing is not done on what it runs on.
    """
    check_writable(arguments.json)
    machine = describe_machine(arguments.threads or 0)
    reader = InternVL.load(
        arguments.answers or example_room() / "bundle", device="cpu", threads=arguments.threads
    )
    kinds = every_kind(reader, arguments.tokens)
    model = InternVL.load(arguments.bundle, device="cpu", threads=arguments.threads, verify="size")
    if not model.engine.backend.takes_drafts:
        raise BundleError(f"{named(arguments.bundle)} runs on what takes no guesses")
    costs = pass_seconds(model, arguments.bundle, arguments.repeat)
    print("\n".join(_cost_lines(costs)), flush=True)
    told = Told(model)
    figures = {}
    for name, kind in kinds.items():
        figures[name] = told.measure(kind, arguments.speculate)
        print(_line(name, figures[name]), flush=True)
    if note := busy_note(machine):
        print(f"note: {note}")
    if arguments.json is not None:
        result = {
            "format": "internvl-edge speculation",
            "version": 1,
            "bundle": open_bundle(arguments.bundle).manifest.precision,
            "layers": model.spec.language.num_hidden_layers,
            "backend": model.engine.backend.description,
            "speculate": arguments.speculate,
            "pass_seconds": costs,
            "answers": {name: asdict(one) | one.rates for name, one in figures.items()},
            "machine": machine,
        }
        write_result(result, arguments.json)
    return 0


def every_kind(reader: InternVL, tokens: int) -> dict[str, list[Answered]]:
    """Return answers of so many tokens a kind: the reader's own and the recorded receipts."""
    forms = {
        name: list(within([one.said for one in kind], tokens)) for name, kind in recorded().items()
    }
    return answered(reader, tokens) | forms


def pass_seconds(model: InternVL, bundle: Path, repeat: int) -> dict[int, float]:
    """Median seconds of passes of `ROWS` rows behind 256 positions, in turns."""
    table, backend = EmbeddingTable.load(open_bundle(bundle)), model.engine.backend
    theta = model.spec.language.rope_theta
    ids = np.random.default_rng(0).integers(0, model.spec.language.vocab_size, 256)
    cache = backend.new_cache(len(ids) + max(ROWS))
    backend.forward([Slice(cache, table.rows(ids), theta, np.array([len(ids) - 1]))])
    cache.state.extend(ids, theta)
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(1 + repeat):
        for rows, found in seconds.items():
            new = Slice(cache, table.rows(ids[:rows]), theta, np.arange(rows))
            before = time.perf_counter()
            backend.forward([new])
            found.append(time.perf_counter() - before)
    return {rows: percentile(found[1:], 50) for rows, found in seconds.items()}


@dataclass
class Figures:
    """Answers of one kind, told with guesses and without.

    Attributes:
        answers, tokens: how many there are; the first token of each comes from its prompt.
        drafted, accepted: tokens that were guessed, and that were right.
        passes: that gave the tokens but the first.
        seconds, plain_seconds: from the first token to the last, with guesses and without.
        ratios: of each answer, plain seconds to seconds.
    """

    answers: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    ratios: list[float] = field(default_factory=list)

    def add(self, timings: Timings, plain: Timings) -> None:
        """Add an answer."""
        decoded = len(timings.token_s) - 1
        self.answers += 1
        self.tokens += decoded
        self.drafted += timings.drafted_tokens
        self.accepted += timings.accepted_tokens
        self.passes += decoded - timings.accepted_tokens
        seconds, without = (one.token_s[-1] - one.token_s[0] for one in (timings, plain))
        self.seconds += seconds
        self.plain_seconds += without
        self.ratios.append(without / seconds)

    @property
    def rates(self) -> dict[str, float]:
        """Return tokens a second with guesses and without, their ratio, and the answers' median."""
        rate, plain = self.tokens / self.seconds, self.tokens / self.plain_seconds
        return {
            "tokens_per_s": rate,
            "plain_tokens_per_s": plain,
            "ratio": rate / plain,
            "median_ratio": percentile(self.ratios, 50),
        }


class Told:
    """A model that tells recorded answers."""

    def __init__(self, model: InternVL) -> None:
        self._model = model
        self._backend = Replay(model.engine.backend)
        model.engine.backend = self._backend

    def measure(self, kind: Sequence[Answered], most: int) -> Figures:
        """Tell each answer with guesses and without, in turns; nothing is known before the first.

        What was told without guesses is not kept for others.
        """
        found = Figures()
        self._model.engine.experience = Experience(self._model.spec.language.vocab_size)
        for number, one in enumerate(kind):
            if len(one.answer) < 2:
                continue
            order = (most, 0) if number % 2 else (0, most)
            told = {speculate: self._tell(one, speculate) for speculate in order}
            found.add(told[most], told[0])
        return found

    def _tell(self, one: Answered, speculate: int) -> Timings:
        # Slots become tokens that occur once, which match nothing either.
        taken = {*one.prompt, *one.answer, self._model.context_id}
        vocab = self._model.spec.language.vocab_size
        fresh = (token for token in range(vocab) if token not in taken)
        ids = [next(fresh) if token == SLOT else token for token in one.prompt]
        self._backend.tell(len(ids), one.answer)
        return self._model.generate(
            ids,
            max_new_tokens=len(one.answer),
            ignore_eos=True,
            sampling=Sampling(speculate=speculate),
        ).timings


class Replay:
    """Passes everything on, but has the next token of a recorded answer chosen."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._prompt = 0
        self._answer: Sequence[int] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def tell(self, prompt: int, answer: Sequence[int]) -> None:
        """Take what follows a prompt of so many tokens."""
        self._prompt, self._answer = prompt, answer

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Run the pass; logits of a row are those of the token that followed there."""
        logits: NDArray[np.float32] = self._inner.forward(batch)
        places = np.concatenate([new.cache.state.length + new.logit_rows for new in batch])
        for row, place in enumerate(places + 1 - self._prompt):
            if 0 <= place < len(self._answer):
                logits[row, self._answer[place]] = np.finfo(np.float32).max
        return logits


def _cost_lines(costs: Mapping[int, float]) -> list[str]:
    return [
        f"a pass of {rows:2} rows: {1e3 * seconds:7.2f} ms, {seconds / costs[1]:.2f}x"
        for rows, seconds in costs.items()
    ]


def _line(name: str, found: Figures) -> str:
    rates = found.rates
    return (
        f"{name:24} {found.answers:3} answers, {found.tokens:4} tokens in {found.passes:4} passes;"
        f" guessed {found.drafted:4}, right {found.accepted:4};"
        f" {rates['plain_tokens_per_s']:.1f} -> {rates['tokens_per_s']:.1f} tok/s:"
        f" {rates['ratio']:.2f}x, median {rates['median_ratio']:.2f}x"
    )
