"""Earlier occurrences of the last tokens, and what followed them: drafts without a second model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Tokens of the longest n-grams.
LONGEST = 3
#: Stands for an image slot: it matches nothing and is never proposed.
_SLOT = -1


class NgramIndex:
    """Finds where the last 1 to `LONGEST` tokens of a growing sequence occurred before.

    The longest n-gram that did counts; of its occurrences the latest, but of a single token the
    first, which stands in the prompt. A token is added in constant time.

    Args:
        ids: token ids so far.
        slot: token id of image slots.
        vocab: more than any token id.

    Attributes:
        matched: length of the n-gram that was found; 0 for none.
    """

    def __init__(self, ids: Sequence[int], slot: int, vocab: int) -> None:
        array = np.asarray(ids, np.int64)
        array = np.where(array == slot, _SLOT, array)
        self._ids: list[int] = array.tolist()
        self._slot, self._vocab = slot, vocab
        #: By length and key of an n-gram, the place after it.
        self._after = [_places(array[:-1], length, vocab) for length in range(1, LONGEST + 1)]
        self.matched, self._place = 0, 0
        self._match()

    def append(self, token: int) -> None:
        """Add a token."""
        self._ids.append(_SLOT if token == self._slot else token)
        self._match()

    @property
    def next(self) -> int:
        """The token that followed; only where something was found."""
        return self._ids[self._place]

    def draft(self, most: int) -> list[int]:
        """Return up to `most` tokens that followed; where they reach the end, they repeat."""
        if not self.matched:
            return []
        period = len(self._ids) - self._place
        found = self._ids[self._place : self._place + most]
        while len(found) < most:
            found.append(found[-period])
        return found[: found.index(_SLOT)] if _SLOT in found else found

    def _match(self) -> None:
        """Look the n-grams up that end here, and note that they do."""
        self.matched, key, radix, end = 0, 0, 1, len(self._ids)
        for length, after in enumerate(self._after[:end], start=1):
            token = self._ids[-length]
            if token == _SLOT:
                return
            key += token * radix
            radix *= self._vocab
            if (place := after.get(key)) is not None:
                self.matched, self._place = length, place
            if place is None or length > 1:
                after[key] = end


def _places(ids: NDArray[np.int64], length: int, vocab: int) -> dict[int, int]:
    """Return the place after each n-gram of a length, by its key."""
    count = len(ids) - length + 1
    if count < 1:
        return {}
    parts = [ids[first : first + count] for first in range(length)]
    keys = np.zeros(count, np.int64)
    for part in parts:
        keys = keys * vocab + part
    starts = np.flatnonzero(np.min(parts, axis=0) != _SLOT)
    if length == 1:  # the last of equals stays
        starts = starts[::-1]
    return dict(zip(keys[starts].tolist(), (starts + length).tolist(), strict=True))
