"""What TensorRT engines read and write, at fixed addresses; and how passes are cut to fit them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import Limits

#: The cache is read in multiples of this, or of more where that gives over `MOST_BUCKETS`.
LEAST_BUCKET = 256
#: Captured graphs of one cache: each keeps a context.
MOST_BUCKETS = 16


def key_bucket(total: int, context: int) -> int:
    """Keys a pass reads whose last row stands at `total - 1`: what it needs, rounded up."""
    step = max(LEAST_BUCKET, -(-context // MOST_BUCKETS))
    return min(-(-total // step) * step, context)


@dataclass(frozen=True)
class Piece:
    """Rows `start..stop` of a pass, and which of them, counted from `start`, get logits."""

    start: int
    stop: int
    wanted: NDArray[np.int64]


def pieces(tokens: int, wanted: NDArray[np.int64], limits: Limits) -> Iterator[Piece]:
    """Cut a pass so that no part has more rows, or more rows with logits, than an engine takes.

    Args:
        wanted: rows that get logits, ascending, `(rows,)`.
    """
    start = 0
    while start < tokens:
        stop = min(start + limits.tokens, tokens)
        first = int(np.searchsorted(wanted, start))
        if first + limits.rows < len(wanted):
            stop = min(stop, int(wanted[first + limits.rows]))
        last = int(np.searchsorted(wanted, stop))
        yield Piece(start, stop, wanted[first:last] - start)
        start = stop


class Staged:
    """An input that stays where it is: page-locked host memory, copied to the device."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._cuda = cuda
        self._host = cuda.pinned(shape, dtype)
        self.device = cuda.empty(shape, dtype)

    def write(self, values: NDArray[Any]) -> None:
        """Queue the copy of `values` to the beginning; the last one must have been made."""
        count = len(values)
        self._host[:count] = values
        self._cuda.upload(self._host[:count], self.device[:count])


class Buffers:
    """Inputs and outputs of the language engine beside the cache, as large as they get.

    Attributes:
        fresh: portable only: new keys and values, which the engine puts nowhere itself.
    """

    def __init__(self, bundle: Bundle, cuda: Cuda, limits: Limits, dtype: str) -> None:
        language, self._cuda = bundle.spec.language, cuda
        self.embeddings = Staged(cuda, (limits.tokens, language.hidden_size), dtype)
        self.positions = Staged(cuda, (limits.tokens,), np.int64)
        self.rows = Staged(cuda, (limits.rows,), np.int64)
        self.keys = cuda.empty((limits.context,), np.int64)
        cuda.upload(np.arange(limits.context, dtype=np.int64), self.keys)
        self.logits = cuda.empty((limits.rows, language.vocab_size), np.float32)
        self._logits_host = cuda.pinned(self.logits.shape, np.float32)
        self.fresh: DeviceArray | None = None
        if not bundle.manifest.traits.cache_in_place:
            shape = contract.cache_shape(language, limits.tokens)
            kind = contract.CACHE_DTYPE[bundle.manifest.kv]
            self.fresh = cuda.empty((2 * language.num_hidden_layers, *shape), kind)

    def addresses(self) -> dict[str, int]:
        """By tensor name."""
        return {
            contract.EMBEDDINGS: self.embeddings.device.address,
            contract.POSITIONS: self.positions.device.address,
            contract.LOGIT_ROWS: self.rows.device.address,
            contract.KEY_POSITIONS: self.keys.address,
            contract.LOGITS: self.logits.address,
        }

    def read_logits(self, rows: int) -> NDArray[np.float32]:
        """Wait for the first rows: the one wait of a pass."""
        self._cuda.download(self.logits[:rows], self._logits_host[:rows])
        self._cuda.synchronize()
        return self._logits_host[:rows].copy()
