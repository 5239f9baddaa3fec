"""A slice of the campaign of random requests that come and go together: `campaign.soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign.soak import soak, tiny_bundle


@pytest.mark.slow(seconds=20)
def test_each_is_answered_as_alone_whatever_the_others_do(tmp_path: Path) -> None:
    totals = soak(tiny_bundle(tmp_path), 1, 300)
    assert totals.faults == []
    assert totals.right + totals.cancelled + totals.refused == 300
    assert min(totals.right, totals.cancelled, totals.refused) > 10
