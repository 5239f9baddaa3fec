"""Logits to the next token: greedy, or temperature, top-k, top-p and min-p with a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import GenerationSpec
from internvl_edge.runtime.arguments import number, whole

#: Temperatures below are greedy: dividing by them would leave nothing but the largest logit.
LEAST_TEMPERATURE = 1e-5
#: With the token before them these are four rows, which our kernels compute as they do one, to the
#: last bit (`kFewRows` in kernels/blocks/few.h): what a pass takes decides on no answer.
FEW_GUESSES = 3
#: Rows of a pass are few with these, and their logits little memory.
MOST_SPECULATED = 63
#: Bound on scores after the penalty, so that a temperature cannot make them infinite.
_LARGEST_SCORE = 1e300


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default is greedy.

    The filters apply in this order: repetition penalty (Keskar et al. 2019, over generated tokens
    only, as the reference does), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen
    et al. 2024).

    Attributes:
        temperature: 0 is greedy, and so is anything below 1e-5.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens until their probability reaches p.
        min_p: keep tokens at least this times as likely as the most likely one.
        repetition_penalty: > 1 makes tokens already generated less likely.
        seed: of the random generator; None draws a fresh one.
        speculate: most tokens guessed ahead at a time, from the prompt and from answers; 0 none.
            The choice among them stays the same; see `speculation`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    speculate: int = FEW_GUESSES

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is all it takes."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def candidates(self) -> int:
        """How many of the largest logits decide; 0: all do.

        1 is the first of equals. Beyond, equals of the last one are kept: hence at least 2.
        """
        if self.greedy:
            return 1
        return max(self.top_k, 2) if self.top_k and self.repetition_penalty == 1 else 0

    @classmethod
    def of_checkpoint(cls, told: GenerationSpec) -> Sampling:
        """Return what a checkpoint's own settings say."""
        return cls(told.temperature, told.top_k, told.top_p, told.min_p, told.repetition_penalty)

    @classmethod
    def of(
        cls, value: Sampling | Mapping[str, Any] | None, default: Sampling | None = None
    ) -> Sampling:
        """Return a Sampling: itself, or the default with some of its fields told by name.

        Args:
            default: of what is not told, or None; greedy unless given.

        Raises:
            UsageError: it is something else.
        """
        if isinstance(value, Sampling):
            return value
        default = cls() if default is None else default
        if value is None:
            return default
        if not isinstance(value, Mapping):
            raise UsageError(f"sampling is {quoted(value)}, it must be a Sampling or its fields")
        known = {field.name for field in fields(cls)}
        for name in value:
            if name not in known:
                raise UsageError(
                    f"sampling has no field {quoted(name)}; known: {', '.join(sorted(known))}"
                )
        return replace(default, **{k: told for k, told in value.items() if told is not None})

    def __post_init__(self) -> None:
        for field in fields(self):
            typed = whole if field.name in ("top_k", "seed", "speculate") else number
            value = getattr(self, field.name)
            value = field.default if value is None else typed(field.name, value)
            object.__setattr__(self, field.name, value)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        _check(0 <= self.temperature < float("inf"), "temperature", self.temperature, ">= 0")
        _check(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 keeps all)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _check(
            0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            self.repetition_penalty,
            "> 0",
        )
        _check(self.seed is None or self.seed >= 0, "seed", self.seed, ">= 0")
        _check(
            0 <= self.speculate <= MOST_SPECULATED,
            "speculate",
            self.speculate,
            f"in 0..{MOST_SPECULATED}",
        )


@dataclass(frozen=True)
class Candidates:
    """Tokens to choose from.

    Attributes:
        logits: float32 `(n,)`.
        ids: int64 `(n,)`, ascending; None: every token of the vocabulary.
    """

    logits: NDArray[np.float32]
    ids: NDArray[np.int64] | None = None


class Sampler:
    """Draws tokens under one `Sampling`; remembers what was generated for the penalty.

    Args:
        sampling: how.
        check: is shown the largest logit of each token; see `FiniteCheck.logit`.
    """

    def __init__(
        self, sampling: Sampling, check: Callable[[float], None] = lambda largest: None
    ) -> None:
        self._sampling = sampling
        self._check = check
        self._random = np.random.default_rng(sampling.seed)
        self._generated: list[int] = []

    def __call__(self, candidates: Candidates) -> int:
        """Choose a token id: from all of the vocabulary or, as the same seed would choose there,
        from at least as many of the largest logits as `Sampling.candidates` says."""
        place = int(candidates.logits.argmax())
        self._check(float(candidates.logits[place]))
        if not self._sampling.greedy:
            place = self._place(filter_logits(candidates.logits, self._generated, self._sampling))
        token = place if candidates.ids is None else int(candidates.ids[place])
        if self._sampling.repetition_penalty != 1:
            self._generated.append(token)
        return token

    def _place(self, filtered: NDArray[np.float64]) -> int:
        if self._sampling.temperature == 0:
            return int(filtered.argmax())
        return int(self._random.choice(len(filtered), p=_softmax(filtered)))


def filter_logits(
    logits: NDArray[np.float32], generated: Sequence[int], sampling: Sampling
) -> NDArray[np.float64]:
    """Apply penalty, temperature and filters to logits `(vocab,)`; removed tokens are -inf."""
    scores = logits.astype(np.float64)
    if sampling.repetition_penalty != 1 and generated:
        seen = np.unique(np.asarray(generated))
        penalty = sampling.repetition_penalty
        with np.errstate(over="ignore"):
            changed = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        scores[seen] = np.clip(changed, -_LARGEST_SCORE, _LARGEST_SCORE)
    if sampling.temperature == 0:
        return scores
    scores /= sampling.temperature
    if 0 < sampling.top_k < len(scores):
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores[scores < kth] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        # Of it and of all less likely ones, smallest first: beside the large ones they would round.
        tail = np.cumsum(_softmax(scores[order])[::-1])[::-1]
        scores[order[1:][tail[1:] <= 1 - sampling.top_p]] = -np.inf  # the first one always stays
    if sampling.min_p > 0:
        scores[scores < scores.max() + np.log(sampling.min_p)] = -np.inf
    return scores


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Natural logarithm of a token's probability under all logits `(vocab,)`."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    return float(scores[token] - np.log(np.exp(scores).sum()))


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def _check(valid: bool, name: str, value: object, limit: str) -> None:
    if not valid:
        raise UsageError(f"is {quoted(value)}, it must be {limit}", option=name)
