"""Drafts by prompt lookup, as many tokens at a time as pay (Saxena 2023, "Prompt Lookup Decoding").

An answer often repeats its prompt, itself or an earlier answer: field names, another turn, a
table's columns. What followed the last tokens there is guessed to follow again, and a pass over a
few rows computes the logits behind each guess for little more than one row takes. Each token is
then chosen as ever: a guess is right where that is what was chosen. For a guess made without doubt
this is the rejection sampling of Leviathan et al. (2023), which leaves the distribution as it is:
the guess is accepted with its own probability, and else one of the others is drawn, as likely as
they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from internvl_edge.runtime.decoding.ngrams import LONGEST, Drafter, NgramIndex
from internvl_edge.runtime.decoding.pass_costs import PassCosts
from internvl_edge.runtime.decoding.recent_answers import RecentAnswers

#: How often a guess is right that 1, 2, 3 tokens speak for, before any was seen; how many guesses
#: that counts as much as; how many of an answer's own what all answers showed does.
_PRIOR, _PRIOR_WEIGHT, _SHARED_WEIGHT = (0.2, 0.4, 0.7), 2.0, 4.0
#: What a guess counts after each later one.
_DECAY = 0.97
#: Promised tokens a second, beside those of a pass without guesses, from which guessing pays.
_LEAST_GAIN = 1.03
#: Time that guessing may lose: of an answer's own without it, and of one pass in all.
_MAY_LOSE, _MAY_LOSE_ONCE = 0.01, 0.5


class Grounds(NamedTuple):
    """Why a token is guessed.

    Attributes:
        recalled: from another answer, not from this one or its prompt.
        matched: how many tokens speak for it; see `Drafter`.
        doubted: whether the other of the two says something else; None where it says nothing.
    """

    recalled: bool
    matched: int
    doubted: bool | None


@dataclass
class _Hits:
    """Guesses on the same grounds and how many were right, of late ones more.

    Attributes:
        right, made: such guesses; fewer the longer ago they were.
    """

    right: float = 0.0
    made: float = 0.0


class HitRates:
    """How often guesses were right lately, by what they were made on.

    Args:
        shared: of all answers; None where these are they.
    """

    def __init__(self, shared: HitRates | None = None) -> None:
        self._shared = shared
        self._hits: defaultdict[Grounds, _Hits] = defaultdict(_Hits)

    def rate(self, grounds: Grounds) -> float:
        """Return the probability that a guess is right."""
        if self._shared is None:
            prior, weight = _PRIOR[grounds.matched - 1], _PRIOR_WEIGHT
        else:
            prior, weight = self._shared.rate(grounds), _SHARED_WEIGHT
        hits = self._hits[grounds]
        return (hits.right + weight * prior) / (hits.made + weight)

    def add(self, grounds: Grounds, hit: bool) -> None:
        """Note a guess."""
        hits = self._hits[grounds]
        hits.right = _DECAY * hits.right + hit
        hits.made = _DECAY * hits.made + 1
        if self._shared is not None:
            self._shared.add(grounds, hit)


@dataclass
class Experience:
    """What the answers of a model showed: what passes take, how often guesses are right, and what
    was answered.

    Attributes:
        vocab: see `NgramIndex`.
        costs: of its decode passes.
        rates: of its guesses.
        answers: the last ones.
    """

    vocab: int
    costs: PassCosts = field(default_factory=PassCosts)
    rates: HitRates = field(default_factory=HitRates)
    answers: RecentAnswers = field(init=False)

    def __post_init__(self) -> None:
        self.answers = RecentAnswers(self.vocab)


@dataclass
class Others:
    """What others bring to a pass.

    Attributes:
        rows: of theirs.
        answers: of theirs.
        tokens: that these rows give, in the mean.
    """

    rows: int = 0
    answers: int = 0
    tokens: float = 0.0

    @classmethod
    def of(cls, answers: int) -> Others:
        """Of answers that bring one row each."""
        return cls(answers, answers, float(answers))


class Speculator:
    """Guesses the tokens of one answer, and learns what that gives.

    It guesses the next token also where no pass is run for it: so it knows when to begin again, and
    whether what this answer repeats or what others said is right more often.

    Args:
        prompt: token ids.
        slot: see `NgramIndex`.
        most: tokens guessed at a time, at least 1.
        experience: of the model.
    """

    def __init__(self, prompt: Sequence[int], slot: int, most: int, experience: Experience) -> None:
        self._prompt, self._slot, self._experience = prompt, slot, experience
        self._drafters: dict[bool, Drafter] = {}  # by `Grounds.recalled`
        self._grounds: list[Grounds] = []  # on which the next token can be guessed
        self._costs = experience.costs
        self._rates = HitRates(experience.rates)
        self._known = 0
        # Seconds: what guessing has saved; what the last guesses cost; what a token takes without.
        self._gained = self._staked = self._token = 0.0
        # Few kinds of passes, so that what each takes is soon known: powers of two, and the most.
        powers = [(1 << power) - 1 for power in range(1, most.bit_length() + 1)]
        self._counts = sorted({*powers[:-1], most})

    def draft(self, ids: Sequence[int], room: int, others: Others) -> list[int]:
        """Return what to guess: as many tokens as promise the pass most of them a second.

        Args:
            ids: the answer so far.
            room: most tokens to guess.
            others: what the pass has of others; gets what this answer adds by guessing.
        """
        before = time.perf_counter()
        self._catch_up(ids)
        best = max(self._grounds, key=self._rates.rate, default=None)
        found: list[int] = []
        if best is not None:
            found = self._drafters[best.recalled].draft(self._count(best, room, others))
        self._costs.searched(time.perf_counter() - before)
        return found

    def resolved(self, tokens: int) -> None:
        """Note how many tokens the pass gave that the last guesses were in."""
        self._gained += (tokens - 1) * self._token - self._staked

    def ended(self, ids: Sequence[int]) -> None:
        """Keep the whole answer for others."""
        self._experience.answers.add(self._prompt, ids, self._slot)

    def _count(self, grounds: Grounds, room: int, others: Others) -> int:
        """Return how many tokens to guess."""
        one = self._costs.seconds(others.rows + 1)
        if not one:
            return 0
        may_lose = self._gained + one * (_MAY_LOSE_ONCE + _MAY_LOSE * self._known)
        best, chosen, promised = _LEAST_GAIN * (others.tokens + 1) / one, 0, 1.0
        for count, expected in self._expected(grounds):
            seconds = self._costs.seconds(others.rows + 1 + count)
            worst = self._costs.worst(others.rows + 1 + count)
            staked = (worst - one) * (others.answers + 1)
            if count > room or staked > may_lose:
                break
            if others.tokens + expected > best * seconds:
                best, chosen, promised = (others.tokens + expected) / seconds, count, expected
                self._staked, self._token = staked, one
        others.rows += chosen
        others.tokens += promised - 1
        return chosen

    def _catch_up(self, ids: Sequence[int]) -> None:
        """Take the tokens that are new; the prompt only now, after the first token was told."""
        if not self._drafters:
            prompt, slot, experience = self._prompt, self._slot, self._experience
            self._drafters = {
                False: Drafter(NgramIndex(prompt, slot, experience.vocab)),
                True: Drafter(experience.answers.before(prompt)),
            }
            self._grounds = self._found()
        for token in ids[self._known :]:
            for grounds in self._grounds:
                self._rates.add(grounds, self._drafters[grounds.recalled].next == token)
            for drafter in self._drafters.values():
                drafter.append(token)
            self._grounds = self._found()
        self._known = len(ids)

    def _found(self) -> list[Grounds]:
        found = {name: drafter for name, drafter in self._drafters.items() if drafter.matched}
        said = {drafter.next for drafter in found.values()}
        doubted = len(said) > 1 if len(found) > 1 else None
        return [Grounds(name, drafter.matched, doubted) for name, drafter in found.items()]

    def _expected(self, grounds: Grounds) -> Iterator[tuple[int, float]]:
        """Yield numbers of guesses, and the tokens that a pass with so many gives in the mean."""
        rates = [
            self._rates.rate(grounds._replace(matched=matched))
            for matched in range(grounds.matched, LONGEST + 1)
        ]
        guessed, tokens, reached = 0, 1.0, 1.0
        for count in self._counts:
            while guessed < count:
                reached *= rates[min(guessed, len(rates) - 1)]
                tokens += reached
                guessed += 1
            yield count, tokens
