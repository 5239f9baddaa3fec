"""Images to rows in the language model's width: kept from earlier, or encoded batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from internvl_edge.runtime.decoding.finite import FiniteCheck
from internvl_edge.runtime.decoding.passes import Engine
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.decoding.reuse import ImageStore, Rows
from internvl_edge.runtime.images.identity import PendingImage, TiledImage


class Encoding:
    """An image on its way to rows.

    Args:
        image: what is encoded.
        rows: its rows, where they are known.

    Attributes:
        rows: float `(tiles * tokens_per_tile, hidden)` once they are complete, else None.
        tiles: how many are encoded.
        seconds: that their passes took.
        error: why there will be no rows.
    """

    def __init__(self, image: TiledImage, rows: Rows | None = None) -> None:
        self.image, self.rows = image, rows
        self.tiles = 0
        self.seconds = 0.0
        self.error: Exception | None = None
        self._some: Rows = np.empty((0, 0))

    @property
    def ended(self) -> bool:
        """Whether its rows are there, or will never be."""
        return self.rows is not None or self.error is not None

    @property
    def left(self) -> int:
        """Tiles that are not encoded yet; after the last one, its rows are put together."""
        return 0 if self.ended else self.image.tiles - self.tiles

    def take(self, batch: Rows, tiles: int) -> Rows | None:
        """Add the rows of its next tiles; return all of them when these were the last."""
        count = len(batch) // tiles
        if not self.tiles:  # most images are one batch, which needs no copy
            whole = tiles == self.image.tiles
            shape = (self.image.tiles * count, batch.shape[1])
            self._some = batch if whole else np.empty(shape, batch.dtype)
        if self._some is not batch:
            start = self.tiles * count
            self._some[start : start + len(batch)] = batch
        self.tiles += tiles
        return self._some if self.tiles == self.image.tiles else None


class ImageEncoder:
    """Encodes images whose rows are not known yet.

    Args:
        engine: runs the vision graph.
        store: rows that are known.
        finite: refuses what is no number.
    """

    def __init__(self, engine: Engine, store: ImageStore, finite: FiniteCheck) -> None:
        self._engine = engine
        self._store = store
        self._finite = finite

    @property
    def tiles_at_once(self) -> int:
        """Tiles of one pass."""
        return self._engine.tiles_at_once

    def begin(self, image: TiledImage) -> Encoding:
        """Return an encoding of an image, complete where its rows are known."""
        return Encoding(image, self._store.get(image.identity))

    def rows(self, image: TiledImage) -> Rows:
        """Encode an image at once: rows `(tiles * tokens_per_tile, hidden)`.

        Raises:
            PrecisionError: they are not finite numbers.
        """
        encoding = self.begin(image)
        while encoding.rows is None:
            self.advance(encoding)
        return encoding.rows

    def advance(self, encoding: Encoding) -> None:
        """Do the next pass over the tiles of one image; see `took`."""
        before = time.perf_counter()
        start, count = encoding.tiles, min(self.tiles_at_once, encoding.left)
        rows = self.run(encoding.image.pixels()[start : start + count])
        self.took(encoding, rows, count, time.perf_counter() - before)

    def run(self, tiles: Any) -> Rows:
        """Encode tiles `(tiles, S, S, 3)` in one pass: rows `(tiles * tokens_per_tile, hidden)`."""
        return self._engine.encode_tiles(tiles)

    def beside(self) -> AbstractContextManager[None]:
        """Let passes over tokens take turns with one over tiles, which no interrupt comes to."""
        turns = self._engine.turns
        return nullcontext() if turns is None else turns.tiles()

    def took(self, encoding: Encoding, rows: Rows, tiles: int, seconds: float) -> None:
        """Take the rows of the next tiles of an image, which took so long.

        Raises:
            PrecisionError: they are not finite numbers.
        """
        self._finite.rows(rows)
        encoding.seconds += seconds
        whole = encoding.take(rows, tiles)
        if whole is not None:
            encoding.rows = self._store.put(encoding.image.identity, whole)


class Vision(Protocol):
    """Where the images of prompts are encoded."""

    def encode(self, request: Request, pending: Sequence[PendingImage]) -> Iterator[bool]:
        """Encode images of a request, which are then told their rows.

        Yields:
            whether a pass was done, until all are encoded.

        Raises:
            PrecisionError: the rows are not finite numbers.
        """


class InTurn:
    """Encodes images one after the other, when its turn comes; see `Vision`.

    Args:
        encoder: encodes.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        self._encoder = encoder

    def encode(self, request: Request, pending: Sequence[PendingImage]) -> Iterator[bool]:
        """See `Vision`."""
        total, done = sum(image.image.tiles for image in pending), 0
        if pending:
            request.tell("tiles", 0, total)
        for image in pending:
            encoding = self._encoder.begin(image.image)
            while encoding.left:
                tiles, before = encoding.tiles, encoding.seconds
                self._encoder.advance(encoding)
                request.timings.vision_s += encoding.seconds - before
                request.timings.tiles += encoding.tiles - tiles
                request.tell("tiles", done + encoding.tiles, total)
                yield True
            done += image.image.tiles
            if not encoding.tiles:  # its rows were known
                request.tell("tiles", done, total)
            image.encoded(encoding)
