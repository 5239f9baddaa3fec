"""The largest logits chosen on a CUDA device: their ids and values are copied to the host.

Greedy decoding takes 8 bytes a token, sampling with a top-k 512. What else sampling may ask for
sorts and sums over the whole vocabulary in float64, with a generator of the host's, and copies all
the logits.
"""

from __future__ import annotations

import logging

import numpy as np

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

    def read(self, count: int) -> Candidates | None:
        """Wait for the largest `count` and what equals the last of them; None: not all are here."""
        if not self.fetch(count):
            return None
        self._cuda.synchronize()
        return self.fetched(count)

    def fetch(self, count: int) -> bool:
        """Queue the copy of what `fetched` reads; whether so many may be here."""
        if not 1 <= count <= SELECT_MOST:
            return False
        copied = _copied(count)
        self._cuda.download(self._found[:copied], self._host[:copied])
        return True

    def fetched(self, count: int) -> Candidates | None:
        """Return what was copied, as `read` does, once somebody has waited."""
        copied = _copied(count)
        ids, logits = read_candidates(self._host[:copied])
        if count > 1 and len(ids) == SELECT_MOST and not logits[-1] < logits[count - 1]:
            return None
        order = np.argsort(ids)
        return Candidates(logits[order], ids[order])


def _copied(count: int) -> int:
    """Return how many are copied: of equals, the greedy choice is the first."""
    return 1 if count == 1 else SELECT_MOST
