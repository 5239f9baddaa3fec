"""The largest logits chosen on a CUDA device: their ids and values are copied to the host.

Greedy decoding takes 8 bytes a token, sampling with a top-k 512. What else sampling may ask for
sorts and sums over the whole vocabulary in float64, with a generator of the host's, and copies all
the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.build import BuildError, cuda_binary
from internvl_edge.kernels.cuda import (
    CANDIDATE,
    SELECT_MOST,
    SELECT_SOURCE,
    CudaKernels,
    read_candidates,
    select_scratch,
)
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.decoding.sampling import Candidates

_log = logging.getLogger("internvl_edge")


def selection_kernels(cuda: Cuda) -> CudaKernels | None:
    """Build the kernels, once per machine; without nvcc say so and return None."""
    try:
        cuda_binary(SELECT_SOURCE)
    except BuildError as error:
        first = str(error).splitlines()[0]
        _log.warning("CUDA kernels not built: %s; tokens are chosen on the CPU", first)
        return None
    return CudaKernels(cuda.driver)


class LargestLogits:
    """The `SELECT_MOST` largest logits of one row of `vocab`, their memory at fixed addresses."""

    def __init__(self, cuda: Cuda, kernels: CudaKernels, vocab: int) -> None:
        self._cuda, self._kernels = cuda, kernels
        self._scratch = cuda.empty((select_scratch(vocab, SELECT_MOST),), CANDIDATE)
        self._found = cuda.empty((SELECT_MOST,), CANDIDATE)
        self._host = cuda.pinned((SELECT_MOST,), CANDIDATE)

    def queue(self, logits: DeviceArray) -> None:
        """Queue the selection from logits `(vocab,)`; may be captured once it has been run."""
        given = {"out": self._found, "scratch": self._scratch, "stream": self._cuda.stream}
        self._kernels.select(logits, **given)

    def fetch(self, count: int) -> bool:
        """Queue the copy of what `fetched` reads; whether so many may be here."""
        if not 1 <= count <= SELECT_MOST:
            return False
        copied = _copied(count)
        self._cuda.download(self._found[:copied], self._host[:copied])
        return True

    def fetched(self, count: int) -> Candidates | None:
        """Return the largest `count` and what equals the last of them, once somebody has waited;
        None: not all are here."""
        copied = _copied(count)
        ids, logits = read_candidates(self._host[:copied])
        if count > 1 and len(ids) == SELECT_MOST and not logits[-1] < logits[count - 1]:
            return None
        order = np.argsort(ids)
        return Candidates(logits[order], ids[order])


class LargestOfRows:
    """The largest logits of each of some rows of a pass.

    Args:
        kernels: None: all logits are copied, and chosen from on the CPU.
        rows: of logits `(rows, vocab)`, at most.
    """

    def __init__(self, cuda: Cuda, kernels: CudaKernels | None, rows: int, vocab: int) -> None:
        self._cuda, self._vocab, self._each = cuda, vocab, list[LargestLogits]()
        if kernels is not None:
            self._each = [LargestLogits(cuda, kernels, vocab) for _ in range(rows)]

    def queue(self, logits: DeviceArray) -> None:
        """Queue the choice from each row of logits `(rows, vocab)`."""
        for row, largest in enumerate(self._each[: len(logits)]):
            largest.queue(logits[row : row + 1].of_shape((self._vocab,)))

    def read(
        self, rows: Sequence[int], count: int, read_all: Callable[[], NDArray[np.float32]]
    ) -> list[Candidates]:
        """Wait for at least the `count` largest logits of some rows.

        Args:
            read_all: waits for the logits of all rows up to the last of these, `(rows, vocab)`:
                where not enough are chosen from one.
        """
        found: list[Candidates | None] = [None for _ in rows]
        chosen = [self._each[row] for row in rows if self._each]
        if copied := [one for one in chosen if one.fetch(count)]:
            self._cuda.synchronize()
            found = [one.fetched(count) for one in copied]
        known = [one for one in found if one is not None]
        if len(known) == len(rows):
            return known
        logits = read_all()
        pairs = zip(found, rows, strict=True)
        return [one or Candidates(logits[row]) for one, row in pairs]


def _copied(count: int) -> int:
    """Return how many are copied: of equals, the greedy choice is the first."""
    return 1 if count == 1 else SELECT_MOST
