"""Images to rows in the language model's width: kept from earlier, or encoded batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from internvl_edge.runtime.decoding.finite import FiniteCheck
from internvl_edge.runtime.decoding.passes import Engine
from internvl_edge.runtime.decoding.request import Timings
from internvl_edge.runtime.decoding.reuse import ImageStore, Rows
from internvl_edge.runtime.images.identity import TiledImage


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

    def steps(self, image: TiledImage, timings: Timings) -> Iterator[Rows | None]:
        """Encode an image, a pass each time.

        Args:
            timings: gets the time and the tiles.

        Yields:
            None after each pass, then the rows `(tiles * tokens_per_tile, hidden)`.

        Raises:
            PrecisionError: the rows are not finite numbers.
        """
        known = self._store.get(image.identity)
        yield from [known] if known is not None else self._encode(image, timings)

    def rows(self, image: TiledImage) -> Rows:
        """Encode an image at once; see `steps`."""
        *_, rows = self.steps(image, Timings())
        assert rows is not None
        return rows

    def _encode(self, image: TiledImage, timings: Timings) -> Iterator[Rows | None]:
        size = self._engine.tiles_at_once
        rows: Rows = np.empty((0, 0))
        for start in range(0, image.tiles, size):
            before = time.perf_counter()
            tiles = image.pixels()[start : start + size]
            batch = self._engine.encode_tiles(tiles)
            self._finite.rows(batch)
            count = len(batch) // len(tiles)
            if start == 0:  # most images are one batch, which needs no copy
                whole = len(tiles) == image.tiles
                shape = (image.tiles * count, batch.shape[1])
                rows = batch if whole else np.empty(shape, batch.dtype)
            rows[start * count : start * count + len(batch)] = batch
            timings.vision_s += time.perf_counter() - before
            timings.tiles += len(tiles)
            yield None
        yield self._store.put(image.identity, rows)
