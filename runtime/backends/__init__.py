"""Execution backends behind one protocol."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

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


class Backend(Protocol):
    """Runs the two graphs of a bundle."""

    @property
    def description(self) -> str:
        """One line for people: library, version, provider, threads."""

    @property
    def numerics(self) -> str:
        """Name of what rows depend on beside the bundle: library, version, device, its plans."""

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> image embeddings `(tiles, tokens_per_tile, hidden)`.

        Tiles are a NumPy array, or what the tiler that came with the backend makes.
        """

    def new_cache(self, capacity: int) -> Cache:
        """Allocate keys and values for `capacity` positions, once."""

    def forward(
        self,
        cache: Cache,
        embeddings: NDArray[np.floating],
        base: float,
        logit_rows: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Append rows `(tokens, hidden)` to `cache`; the caller extends the state afterwards.

        Args:
            cache: from this backend's `new_cache`; written in place.
            embeddings: the new rows, in the language graph's dtype.
            base: rotary base of this pass.
            logit_rows: which of the new rows want logits, `(rows,)`.

        Returns:
            logits `(rows, vocab)`.
        """


@runtime_checkable
class SelectingBackend(Protocol):
    """A backend that can also find the largest logits where they are, and leaves the others."""

    def forward_candidates(
        self, cache: Cache, embeddings: NDArray[np.floating], base: float, count: int
    ) -> Candidates:
        """Like `Backend.forward` with one row `(1, hidden)`.

        Args:
            count: how many of the largest logits are wanted.

        Returns:
            these and what equals the last of them (where it is one: the first of equals, as
            `numpy.argmax` has it), or more, or all.
        """
