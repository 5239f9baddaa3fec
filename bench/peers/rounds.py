"""Rounds of this runtime and of a peer in turns, and what they say.

Ratios are taken turn by turn, and their median counts: another process that slows the machine slows
both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from internvl_edge.bench.peers.comparison import Standing
from internvl_edge.bench.peers.worker import Round, Worker

#: Seconds between turns, for the threads of the last one to stop spinning.
PAUSE = 0.1


@dataclass(frozen=True)
class Settings:
    """What every system is given.

    Attributes:
        prompt: tokens prefilled.
        new_tokens: tokens decoded after them, of each sequence.
        sequences: how many are decoded together, one number after another.
        runs: measured rounds, after one of warm-up.
    """

    threads: int
    prompt: int
    new_tokens: int
    sequences: tuple[int, ...]
    runs: int

    @property
    def context(self) -> int:
        """Positions of each sequence."""
        return self.prompt + self.new_tokens

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What an engine is made of beside its file: threads, positions, most sequences."""
        return self.threads, self.context, max(self.sequences)


@dataclass(frozen=True)
class Rate:
    """Tokens a second of all sequences, medians; `ratio` is this runtime's over the peer's."""

    peer: float
    own: float
    ratio: float


@dataclass(frozen=True)
class DecoderStanding(Standing):
    """What rounds of decoders say.

    Attributes:
        decode: by the number of sequences.
    """

    prefill: Rate
    decode: dict[int, Rate]
    own_rounds: list[Round]
    rounds: list[Round]

    @property
    def lines(self) -> Iterator[str]:
        """Tokens a second of each phase."""
        decode = {f"decode of {count}": rate for count, rate in self.decode.items()}
        for name, rate in {"prefill": self.prefill, **decode}.items():
            yield f"  {name:12} {rate.peer:9.2f}, here {rate.own:9.2f}: {rate.ratio:5.2f}x"


def rate(own: Sequence[float], peer: Sequence[float]) -> Rate:
    """Return what tokens a second of rounds in turns say."""
    ratio = statistics.median(a / b for a, b in zip(own, peer, strict=True))
    return Rate(statistics.median(peer), statistics.median(own), ratio)


def prefill_rate(own: Sequence[Round], peer: Sequence[Round]) -> Rate:
    """Return the rates of prefill of two systems' rounds, taken in turns with the same prompt."""
    mine, theirs = ([r.prompt / r.prefill_s for r in rounds] for rounds in (own, peer))
    return rate(mine, theirs)


def decode_rate(own: Sequence[Round], peer: Sequence[Round], sequences: int) -> Rate:
    """Return the rates of so many sequences that are decoded together."""
    mine, theirs = (
        [sequences / statistics.median(r.decode_s[sequences]) for r in rounds]
        for rounds in (own, peer)
    )
    return rate(mine, theirs)


def in_turns(own: Worker, peer: Worker, settings: Settings) -> tuple[list[Round], list[Round]]:
    """Measure both, a round of each after the other."""
    prompt = _prompt(settings.prompt)
    rounds: tuple[list[Round], list[Round]] = ([], [])
    for number in range(settings.runs + 1):
        for system, taken in zip((own, peer), rounds, strict=True):
            result = system.round(prompt, settings.new_tokens, settings.sequences)
            if number:  # the first is warm-up
                taken.append(result)
            time.sleep(PAUSE)
    return rounds


def _prompt(tokens: int) -> list[int]:
    """Ids that every vocabulary of the family has, none of them special."""
    return [int(token) for token in np.random.default_rng(0).integers(3, 450, tokens)]
