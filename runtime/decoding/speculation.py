"""Drafts by prompt lookup, as many tokens at a time as pay (Saxena 2023, "Prompt Lookup Decoding").

An answer often repeats its prompt, or itself: field names, an earlier turn, a table's columns. What
followed the last tokens before is guessed to follow again, and a pass over a few rows computes the
logits behind each guess for little more than one row takes. Each token is then chosen as ever: a
guess is right where that is what was chosen. For a guess made without doubt this is the rejection
sampling of Leviathan et al. (2023), which leaves the distribution as it is: the guess is accepted
with its own probability, and else one of the others is drawn, as likely as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from internvl_edge.runtime.decoding.ngrams import LONGEST, Drafter
from internvl_edge.runtime.decoding.pass_costs import PassCosts

#: How often a guess is right that an n-gram of 1, 2, 3 tokens gives, before any was seen; how many
#: guesses that counts as much as; how many of an answer's own what all answers showed does.
_PRIOR, _PRIOR_WEIGHT, _SHARED_WEIGHT = (0.2, 0.4, 0.7), 2.0, 4.0
#: What a guess counts after each later one.
_DECAY = 0.97
#: Promised tokens a second, beside those of a pass without guesses, from which guessing pays.
_LEAST_GAIN = 1.03
#: Time that guessing may lose: of an answer's own without it, and of one pass in all.
_MAY_LOSE, _MAY_LOSE_ONCE = 0.01, 0.5


class HitRates:
    """How often guesses were right lately, by the length of the n-gram that gave them.

    Args:
        shared: of all answers; None where these are they.
    """

    def __init__(self, shared: HitRates | None = None) -> None:
        self._shared = shared
        self._hits, self._guesses = [0.0] * LONGEST, [0.0] * LONGEST

    def rate(self, matched: int) -> float:
        """Return the probability that a guess is right."""
        place = min(matched, LONGEST) - 1
        if self._shared is None:
            prior, weight = _PRIOR[place], _PRIOR_WEIGHT
        else:
            prior, weight = self._shared.rate(matched), _SHARED_WEIGHT
        return (self._hits[place] + weight * prior) / (self._guesses[place] + weight)

    def add(self, matched: int, hit: bool) -> None:
        """Note a guess."""
        place = min(matched, LONGEST) - 1
        self._hits[place] = _DECAY * self._hits[place] + hit
        self._guesses[place] = _DECAY * self._guesses[place] + 1
        if self._shared is not None:
            self._shared.add(matched, hit)


@dataclass(frozen=True)
class Experience:
    """What the answers of a model showed: what passes take, and how often guesses are right.

    Attributes:
        vocab: see `NgramIndex`.
        costs: of its decode passes.
        rates: of its guesses.
    """

    vocab: int
    costs: PassCosts = field(default_factory=PassCosts)
    rates: HitRates = field(default_factory=HitRates)


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

    It guesses the next token also where no pass is run for it: so it knows when to begin again.

    Args:
        prompt: token ids.
        slot: see `NgramIndex`.
        most: tokens guessed at a time, at least 1.
        experience: of the model.
    """

    def __init__(self, prompt: Sequence[int], slot: int, most: int, experience: Experience) -> None:
        self._prompt, self._slot, self._vocab = prompt, slot, experience.vocab
        self._drafter: Drafter | None = None
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
        drafter = self._caught_up(ids)
        matched = drafter.matched
        found = drafter.draft(self._count(matched, room, others)) if matched else []
        self._costs.searched(time.perf_counter() - before)
        return found

    def resolved(self, tokens: int) -> None:
        """Note how many tokens the pass gave that the last guesses were in."""
        self._gained += (tokens - 1) * self._token - self._staked

    def _count(self, matched: int, room: int, others: Others) -> int:
        """Return how many tokens to guess."""
        one = self._costs.seconds(others.rows + 1)
        if not one:
            return 0
        may_lose = self._gained + one * (_MAY_LOSE_ONCE + _MAY_LOSE * self._known)
        best, chosen, promised = _LEAST_GAIN * (others.tokens + 1) / one, 0, 1.0
        for count, expected in self._expected(matched):
            seconds = self._costs.seconds(others.rows + 1 + count)
            staked = (seconds - one) * (others.answers + 1)
            if count > room or staked > may_lose:
                break
            if others.tokens + expected > best * seconds:
                best, chosen, promised = (others.tokens + expected) / seconds, count, expected
                self._staked, self._token = staked, one
        others.rows += chosen
        others.tokens += promised - 1
        return chosen

    def _caught_up(self, ids: Sequence[int]) -> Drafter:
        """Take the tokens that are new; the prompt only now, after the first token was told."""
        if self._drafter is None:
            self._drafter = Drafter(self._prompt, self._slot, self._vocab)
        drafter = self._drafter
        for token in ids[self._known :]:
            if drafter.matched:
                self._rates.add(drafter.matched, drafter.next == token)
            drafter.append(token)
        self._known = len(ids)
        return drafter

    def _expected(self, matched: int) -> Iterator[tuple[int, float]]:
        """Yield numbers of guesses, and the tokens that a pass with so many gives in the mean."""
        rates = [self._rates.rate(length) for length in range(matched, LONGEST + 1)]
        guessed, tokens, reached = 0, 1.0, 1.0
        for count in self._counts:
            while guessed < count:
                reached *= rates[min(guessed, len(rates) - 1)]
                tokens += reached
                guessed += 1
            yield count, tokens
