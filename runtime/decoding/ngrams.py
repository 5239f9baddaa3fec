"""Earlier occurrences of the last tokens, and what followed them: drafts without a second model.

Of places where a text could go on, the one counts where a copy was broken off: a form that is
filled in goes on behind each value as it was given, although its punctuation occurs everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

#: Tokens of the longest n-grams.
LONGEST = 3
#: Tokens copied in a row, from which their place is worth keeping.
_COPY = 2
#: Stands for an image slot, or between texts: it matches nothing and is never proposed.
SLOT = -1


class Text(Protocol):
    """Tokens that a growing sequence may repeat.

    Attributes:
        matched: what speaks for a place: the length of an n-gram, or what counts as much; 0 for
            nothing.
        place: of the token that may come next in the sequence; only where something speaks for it.
    """

    matched: int
    place: int

    @property
    def ids(self) -> Sequence[int]:
        """Of these tokens."""

    def append(self, token: int) -> None:
        """Take the sequence's next token."""


class NgramIndex:
    """Finds where the last 1 to `LONGEST` tokens of a growing sequence occurred before.

    The longest n-gram that did counts; of its occurrences the latest, but of a single token the
    first, which stands in the prompt. A token is added in constant time.

    Args:
        ids: token ids so far.
        slot: token id of image slots.
        vocab: more than any token id.

    Attributes:
        ids: token ids so far, image slots marked.
        matched: length of the n-gram that was found; 0 for none.
        place: of the token that followed; only where something was found.
    """

    def __init__(self, ids: Sequence[int], slot: int, vocab: int) -> None:
        array = np.asarray(ids, np.int64)
        array = np.where(array == slot, SLOT, array)
        self.ids: list[int] = array.tolist()
        self._slot, self._vocab = slot, vocab
        #: By length and key of an n-gram, the place after it.
        self._after = [_places(array[:-1], length, vocab) for length in range(1, LONGEST + 1)]
        self.matched, self.place = 0, 0
        self._match()

    def append(self, token: int) -> None:
        """Add a token."""
        self.ids.append(SLOT if token == self._slot else token)
        self._match()

    def _match(self) -> None:
        """Look the n-grams up that end here, and note that they do."""
        self.matched, key, radix, end = 0, 0, 1, len(self.ids)
        for length, after in enumerate(self._after[:end], start=1):
            token = self.ids[-length]
            if token == SLOT:
                return
            key += token * radix
            radix *= self._vocab
            if (place := after.get(key)) is not None:
                self.matched, self.place = length, place
            if place is None or length > 1:
                after[key] = end


class Drafter:
    """Guesses how a growing sequence goes on: as what is being copied, or where a text says.

    While guesses are right, a copy goes on. Where it is broken off, its place is kept until another
    one is, and it goes on from there when its next token comes: unless the n-gram that ends then is
    longer than what was copied since.

    Args:
        text: what it may repeat.

    Attributes:
        matched: how many tokens speak for the guess, up to `LONGEST`; 0: there is none.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self.matched, self._place = text.matched, text.place
        self._copied = 0  # tokens, one behind the other
        self._broken: int | None = None

    @property
    def next(self) -> int:
        """The token that is guessed; only where there is a guess."""
        return self._text.ids[self._place]

    def append(self, token: int) -> None:
        """Add a token."""
        text, source = self._text, self._source(token)
        self._copied = 0 if source is None else self._copied + 1
        text.append(token)
        self.matched, self._place = text.matched, text.place
        copied = min(self._copied, LONGEST)
        if source is not None and copied >= self.matched and text.ids[source] != SLOT:
            self.matched, self._place = copied, source

    def draft(self, most: int) -> list[int]:
        """Return up to `most` tokens that followed; where they reach the end, they repeat."""
        if not self.matched:
            return []
        ids = self._text.ids
        period = len(ids) - self._place
        found = list(ids[self._place : self._place + most])
        while len(found) < most:
            found.append(found[-period])
        return found[: found.index(SLOT)] if SLOT in found else found

    def _source(self, token: int) -> int | None:
        """Return the place behind the one that a new token is copied from."""
        if self.matched:
            if self.next == token:
                return self._place + 1
            if self._copied >= _COPY:
                self._broken = self._place
        self._copied = 0
        if self._broken is not None and self._text.ids[self._broken] == token:
            return self._broken + 1
        return None


def _places(ids: NDArray[np.int64], length: int, vocab: int) -> dict[int, int]:
    """Return the place after each n-gram of a length, by its key; images' slots are in none."""
    count = len(ids) - length + 1
    if count < 1:
        return {}
    parts = [ids[first : first + count] for first in range(length)]
    keys = np.zeros(count, np.int64)
    for part in parts:
        keys = keys * vocab + part
    starts = np.flatnonzero(np.min(parts, axis=0) != SLOT)
    if length == 1:  # the last of equals stays
        starts = starts[::-1]
    return dict(zip(keys[starts].tolist(), (starts + length).tolist(), strict=True))
