"""Progress on the terminal: bytes, rate, time left."""

from __future__ import annotations

import sys

from tqdm import tqdm

from internvl_edge.export.graph import Progress


def progress_bar(total_bytes: int) -> Progress:
    """A bar on stderr for `total_bytes`; call the result with each increment."""
    bar = tqdm(
        total=total_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc="export",
        file=sys.stderr,
        leave=True,
    )

    def advance(count: int) -> None:
        bar.update(count)
        if bar.n >= total_bytes:
            bar.close()

    return advance
