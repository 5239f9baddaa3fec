"""Calibrating on little, for tests of something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from internvl_edge.export.calibration import run as calibration_run

#: Pictures that scales are taken from.
ITEMS = 2


@contextmanager
def few_items() -> Iterator[None]:
    """Calibrate on a few of the generator's pictures while this lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_run, "DEFAULT_ITEMS", ITEMS)
        yield
