"""Progress on the terminal: bytes, rate, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from internvl_edge.export.graphs.graph import Progress


@contextmanager
def progress_bar(label: str, *, unit: str = "B") -> Iterator[Callable[[int], Progress]]:
    """Gives a function that draws a bar on stderr, if that is a terminal, for a number of units.

    The bar is closed at the end, so that whatever is printed next, an error included, begins a
    line.
    """
    with ExitStack() as bars:

        def start(total: int) -> Progress:
            bar = tqdm(
                total=total,
                unit=unit,
                unit_scale=unit == "B",
                unit_divisor=1024,
                desc=label,
                file=sys.stderr,
                disable=None,  # without a terminal
            )
            bars.enter_context(bar)

            def advance(count: int) -> None:
                bar.update(count)

            return advance

        yield start
