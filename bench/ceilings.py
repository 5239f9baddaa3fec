"""What this machine can do at best, measured now: the denominators of every percentage."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

#: Far beyond any last-level cache (256 MiB each way).
COPY_BYTES = 256 << 20


def copy_bandwidth(threads: int, *, runs: int = 5) -> float:
    """Bytes a second, read plus written, of `threads` copying large arrays; the best of `runs`."""
    # Both written once: untouched pages would all be read from one page of zeros.
    source = np.ones((threads, COPY_BYTES // threads), np.uint8)
    target = np.ones_like(source)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(runs):
            started = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best
