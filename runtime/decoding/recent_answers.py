"""Answers given lately: what followed three tokens in one of them may follow them in the next.

Who asks the same of one picture after another gets the same words around other values: the keys and
the punctuation of a JSON object, which the prompt need not spell out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from internvl_edge.runtime.decoding.ngrams import LONGEST, SLOT

#: Most tokens kept; the oldest are written over.
KEPT = 16_384
#: Places that are found again: a prime, so that n-grams spread over them.
_PLACES = 65_521


class RecentAnswers:
    """Keeps a model's last answers, in memory that neither grows nor comes and goes.

    Several threads may add to one; where they meet, a later guess may be worse.

    Args:
        vocab: more than any token id.

    Attributes:
        ids: of their tokens, with `SLOT` behind each answer.
    """

    def __init__(self, vocab: int) -> None:
        self.ids = array("q", [SLOT]) * KEPT
        self._end, self._vocab = 0, vocab
        #: Behind the latest n-gram of those with the same hash; 0 for none.
        self._places = np.zeros(_PLACES, np.int32)

    def add(self, prompt: Sequence[int], answer: Sequence[int], slot: int) -> None:
        """Keep an answer, behind the prompt's last tokens.

        Args:
            prompt, answer: token ids.
            slot: token id of image slots.
        """
        given = np.array([*prompt[-LONGEST:], *answer][1 - KEPT :], np.int64)
        given[given == slot] = SLOT
        start = self._end if self._end + len(given) < KEPT else 0
        self._end = start + len(given) + 1
        self.ids[start : self._end] = array("q", [*given.tolist(), SLOT])
        if len(given) >= LONGEST:
            radix = [self._vocab**power for power in reversed(range(LONGEST))]
            hashes = sliding_window_view(given, LONGEST) @ np.array(radix, np.int64) % _PLACES
            self._places[hashes] = np.arange(start + LONGEST, self._end)

    def place(self, last: tuple[int, ...]) -> int:
        """Return the place behind these `LONGEST` tokens, where they are found; else 0."""
        key = 0
        for token in last:
            key = key * self._vocab + token
        place = int(self._places[key % _PLACES])
        return place if tuple(self.ids[place - LONGEST : place]) == last else 0

    def before(self, ids: Sequence[int]) -> Recalled:
        """Return these answers as what a sequence that begins with `ids` may repeat."""
        return Recalled(self, ids)


class Recalled:
    """Where in answers the last `LONGEST` tokens of a growing sequence occurred; see `Text`.

    Args:
        answers: given lately.
        ids: of the sequence so far.
    """

    def __init__(self, answers: RecentAnswers, ids: Sequence[int]) -> None:
        self.ids = answers.ids
        self._answers = answers
        self._last = tuple(ids[-LONGEST:])
        self._match()

    def append(self, token: int) -> None:
        """Take the sequence's next token."""
        self._last = (*self._last[1 - LONGEST :], token)
        self._match()

    def _match(self) -> None:
        """Look the last tokens up. They count as one: another answer is another picture's."""
        self.place = self._answers.place(self._last) if len(self._last) == LONGEST else 0
        self.matched = int(self.place > 0 and self.ids[self.place] != SLOT)
