"""The next token chosen on a CUDA device: its id is copied to the host, the logits stay.

Greedy only. Sampling sorts and sums over the whole vocabulary in float64 with a generator of the
host's, and copies the logits.
"""

from __future__ import annotations

import logging

import numpy as np

from internvl_edge.kernels.build import BuildError, cuda_binary
from internvl_edge.kernels.cuda import SELECT_MOST_BLOCKS, SELECT_SOURCE, CudaKernels
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.runtime.cuda import Cuda

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


class GreedyChoice:
    """The token of the largest logit, its memory at fixed addresses."""

    def __init__(self, cuda: Cuda, kernels: CudaKernels) -> None:
        self._cuda, self._kernels = cuda, kernels
        self._best = cuda.empty((SELECT_MOST_BLOCKS,), np.uint64)
        self._id = cuda.empty((1,), np.int32)
        self._host = cuda.pinned((1,), np.int32)

    def queue(self, logits: DeviceArray) -> None:
        """Queue the choice among logits `(vocab,)`; may be captured once it has been run."""
        self._kernels.argmax(logits, out=self._id, best=self._best, stream=self._cuda.stream)

    def read(self) -> int:
        """Wait for the token chosen last."""
        self._cuda.download(self._id, self._host)
        self._cuda.synchronize()
        return int(self._host[0])
