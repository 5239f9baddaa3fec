"""Execution backends behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import LimitError
from internvl_edge.kernels.operators.turns import Turns
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.decoding.sampling import Candidates


class Cache(Protocol):
    """A KV cache: the state the loop reads, beside storage only its backend knows."""

    state: CacheState

    @property
    def nbytes(self) -> int:
        """Memory its filled positions take."""

    @property
    def held_bytes(self) -> int:
        """All the memory it takes between passes: what was ever written to, and what goes with
        it."""

    def trim(self) -> None:
        """Give back what only passes need."""

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        """Take positions `start..stop` of another cache of the same backend; `state` stays."""

    def clear(self) -> None:
        """Zero what was written, where passes read beyond the length: a masked key has the weight
        zero, and zero times NaN stays NaN."""


#: Sequences that a pass takes where it takes several.
MOST_SLICES = 1024


@dataclass(frozen=True)
class Slice:
    """What one sequence brings to a pass.

    Attributes:
        cache: from the backend's `new_cache`; new keys and values are written into it. Its state
            is the caller's to extend afterwards.
        rows: embeddings `(tokens, hidden)` behind the cached ones, in the language graph's dtype.
        rope_theta: rotary base of the new positions.
        logit_rows: int64 `(n,)`, which of the new rows want logits.
    """

    cache: Cache
    rows: NDArray[np.floating]
    rope_theta: float
    logit_rows: NDArray[np.int64]


class Backend(Protocol):
    """Runs the two graphs of a bundle."""

    @property
    def description(self) -> str:
        """One line for people: library, version, provider, threads."""

    @property
    def numerics(self) -> str:
        """Name of what rows depend on beside the bundle: library, version, device, its plans."""

    @property
    def most_slices(self) -> int:
        """Sequences one pass takes; 1 where they are run one by one."""

    @property
    def takes_drafts(self) -> bool:
        """Whether guessed rows may be appended and cut off again: nothing behind a cache's length
        is ever read, and a few rows take little more time than one."""

    @property
    def holds_scores(self) -> bool:
        """Whether attention holds the scores of all rows of a pass with all keys, at one time."""

    @property
    def turns(self) -> Turns | None:
        """What lets its passes over tokens and over tiles take turns; None: they compete for the
        cores, or do not."""

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> image embeddings `(tiles, tokens_per_tile, hidden)`.

        Tiles are a NumPy array, or what the tiler that came with the backend makes.
        """

    def new_cache(self, capacity: int) -> Cache:
        """Allocate keys and values for `capacity` positions, once."""

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        """Append the rows of every slice to its cache in one pass.

        Returns:
            logits `(logit rows of all slices, vocab)`, slice after slice.

        Raises:
            LimitError: more slices than the backend runs in one pass.
        """


class PlainPasses:
    """What a backend says of its passes unless it knows better; see `Backend`."""

    @property
    def takes_drafts(self) -> bool:
        return False

    @property
    def holds_scores(self) -> bool:
        return True

    @property
    def turns(self) -> None:
        return None


@runtime_checkable
class SelectingBackend(Protocol):
    """A backend that can also find the largest logits where they are, and leaves the others."""

    def forward_candidates(self, batch: Sequence[Slice], count: int) -> list[Candidates]:
        """Like `Backend.forward` with slices of one row `(1, hidden)`.

        Args:
            batch: see `Backend.forward`.
            count: how many of the largest logits are wanted.

        Returns:
            for each slice, these and what equals the last of them (where it is one: the first of
            equals, as `numpy.argmax` has it), or more, or all.

        Raises:
            LimitError: more slices than the backend runs in one pass.
        """


@runtime_checkable
class SlottedBackend(Protocol):
    """A backend whose passes take caches from a number of places."""

    def is_in_way(self, cache: Cache) -> bool:
        """Whether the next cache would be run by itself, and would not if this one were gone."""


def single(batch: Sequence[Slice]) -> Slice:
    """Return the only slice of a batch.

    Raises:
        LimitError: it has another number of them.
    """
    if len(batch) != 1:
        raise LimitError(
            f"this backend runs 1 sequence in a pass, got {len(batch)}; run them one by one"
        )
    return batch[0]


def several(batch: Sequence[Slice], most: int) -> Sequence[Slice]:
    """Return a batch of at least one slice, and of not more than are taken.

    Raises:
        LimitError: it has another number of them.
    """
    if most == 1:
        return [single(batch)]
    if not 1 <= len(batch) <= most:
        raise LimitError(f"this backend runs 1 to {most} sequences in a pass, got {len(batch)}")
    return batch
