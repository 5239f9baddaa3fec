"""A prompt as the decoder sees it: token ids, and rows of images for some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import PromptError


class PromptImage(Protocol):
    """An image of a prompt: how many rows it takes, and the rows once it is encoded."""

    @property
    def signatures(self) -> NDArray[np.int64]:
        """Negative numbers `(rows,)` that name the image and the row; see `CacheState`."""

    @property
    def rows(self) -> NDArray[np.floating]:
        """Float `(tiles * tokens_per_tile, hidden)`."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class EncodedImage:
    """One image in the language model's width; see `PromptImage`."""

    rows: NDArray[np.floating]
    signatures: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class TokenSequence:
    """A prompt as the decoder sees it.

    Attributes:
        ids: int64 `(tokens,)`, image slots holding the context token's id.
        signatures: int64 `(tokens,)`: the ids, with image slots replaced by their rows'.
        slots: int64 `(image rows,)`, positions of the image slots in order.
        images: whose rows belong into the slots, in order.
        answered: of the tokens, how many at the end were generated: each of them has the rotary
            base of a sequence that ends with it.
    """

    ids: NDArray[np.int64]
    signatures: NDArray[np.int64]
    slots: NDArray[np.int64]
    images: Sequence[PromptImage]
    answered: int = 0

    @classmethod
    def build(
        cls, ids: Sequence[int], context_id: int, images: Sequence[PromptImage]
    ) -> TokenSequence:
        """Join token ids and images.

        Raises:
            PromptError: the number of context tokens is not the number of image rows.
        """
        array = np.asarray(ids, np.int64)
        slots = np.flatnonzero(array == context_id)
        check_slots(len(slots), sum(map(len, images)))
        signatures = array.copy()
        named = [np.empty(0, np.int64), *(image.signatures for image in images)]
        signatures[slots] = np.concatenate(named)
        return cls(array, signatures, slots, images)

    def __len__(self) -> int:
        return len(self.ids)

    def then(self, answer: Sequence[int]) -> TokenSequence:
        """Return this prompt and what was answered, in which a context token is no image's slot."""
        tail = np.asarray(answer, np.int64)
        ids, signatures = np.append(self.ids, tail), np.append(self.signatures, tail)
        return TokenSequence(ids, signatures, self.slots, self.images, len(tail))

    def common(self, other: TokenSequence) -> int:
        """Leading positions that two sequences have in common."""
        shared = min(len(self), len(other))
        differs = self.signatures[:shared] != other.signatures[:shared]
        return int(differs.argmax()) if differs.any() else shared

    def needed(self, start: int) -> list[tuple[int, int]]:
        """Return which images have rows from position `start` on, and the first such row of each:
        indices of `images` and of rows."""
        first = int(np.searchsorted(self.slots, start))
        found, offset = [], 0
        for index, image in enumerate(self.images):
            end = offset + len(image)
            if end > first:
                found.append((index, max(0, first - offset)))
            offset = end
        return found

    def image_rows(self, start: int) -> ImageRows:
        """Rows of the slots from position `start` on. Images that lie before are not asked."""
        first = int(np.searchsorted(self.slots, start))
        parts = [self.images[index].rows[row:] for index, row in self.needed(start)]
        return ImageRows(self.slots[first:], parts)


class ImageRows:
    """The rows that go into some slots `(image rows,)`, in order, from one or many arrays."""

    def __init__(self, slots: NDArray[np.int64], parts: Sequence[NDArray[np.floating]]) -> None:
        self._slots, self._parts = slots, parts
        #: Rows before each part, and in all.
        self._offsets = np.cumsum([0, *map(len, parts)])

    def put(self, target: NDArray[np.floating], start: int) -> None:
        """Write the rows whose slots lie in `target`, the positions from `start` on.

        Read where they are: 41 tiles of a 2B model are 86 MB.
        """
        first, last = np.searchsorted(self._slots, [start, start + len(target)])
        for part, offset in zip(self._parts, self._offsets, strict=False):
            begin, end = max(first, offset), min(last, offset + len(part))
            if begin < end:
                target[self._slots[begin:end] - start] = part[begin - offset : end - offset]


def check_slots(slots: int, rows: int) -> None:
    """Raise PromptError unless the prompt has one context token per image row."""
    if slots != rows:
        raise PromptError(
            f"the prompt has {slots} <IMG_CONTEXT> tokens for {rows} image rows; remove"
            " <IMG_CONTEXT> from the text (images bring their own) or pass the missing image"
        )
