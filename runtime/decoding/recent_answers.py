"""Answers given lately: what followed three tokens in one of them may follow them in the next.

Who asks the same of one picture after another gets the same words around other values: the keys and
the punctuation of a JSON object, which the prompt need not spell out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from internvl_edge.runtime.decoding.ngrams import LONGEST, SLOT, places

#: Most tokens kept; when there are more, the later half stays.
KEPT = 16_384


@dataclass(frozen=True)
class _Kept:
    """Answers with `SLOT` around each, and the place behind the latest of each n-gram, by key."""

    ids: list[int] = field(default_factory=lambda: [SLOT])
    after: dict[int, int] = field(default_factory=dict)


class RecentAnswers:
    """Keeps a model's last answers.

    Several threads may add to one; where they meet, a later guess may be worse.

    Args:
        vocab: more than any token id.
    """

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._kept = _Kept()

    def add(self, prompt: Sequence[int], answer: Sequence[int], slot: int) -> None:
        """Keep an answer, behind the prompt's last tokens.

        Args:
            prompt, answer: token ids.
            slot: token id of image slots.
        """
        kept, given = self._kept, np.array([*prompt[-LONGEST:], *answer], np.int64)
        given[given == slot] = SLOT
        start = len(kept.ids)
        kept.ids.extend([*given.tolist(), SLOT])
        found = places(given, LONGEST, self._vocab)
        kept.after.update({key: start + place for key, place in found.items()})
        if len(kept.ids) > KEPT:
            ids = kept.ids[kept.ids.index(SLOT, -KEPT // 2) :]
            self._kept = _Kept(ids, places(np.array(ids, np.int64), LONGEST, self._vocab))

    def before(self, ids: Sequence[int], slot: int) -> Recalled:
        """Return these answers as what a sequence that begins with `ids` may repeat."""
        kept = self._kept  # another thread may put a new one there
        return Recalled(kept.ids, kept.after, ids, slot, self._vocab)


class Recalled:
    """Where in answers the last `LONGEST` tokens of a growing sequence occurred; see `Text`.

    Args:
        answers: token ids, `SLOT` around each answer.
        after: the place behind each n-gram, by its key.
        ids: of the sequence so far.
        slot, vocab: see `NgramIndex`.
    """

    def __init__(
        self,
        answers: list[int],
        after: Mapping[int, int],
        ids: Sequence[int],
        slot: int,
        vocab: int,
    ) -> None:
        self.ids = answers
        self._after, self._slot, self._vocab = after, slot, vocab
        self._last = tuple(ids[-LONGEST:])
        self._match()

    def append(self, token: int) -> None:
        """Take the sequence's next token."""
        self._last = (*self._last[1 - LONGEST :], token)
        self._match()

    def _match(self) -> None:
        """Look the last tokens up. They count as one: another answer is another picture's."""
        self.matched, self.place = 0, 0
        if len(self._last) < LONGEST or self._slot in self._last:
            return
        key = 0
        for token in self._last:
            key = key * self._vocab + token
        place = self._after.get(key)
        if place is not None and self.ids[place] != SLOT:
            self.matched, self.place = 1, place
