"""A short slice of the campaign of damaged files; see `campaign.damage`."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign.damage import Campaign, Totals

pytestmark = pytest.mark.slow(seconds=1)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("damage"), seed=20)


def test_bits_of_the_manifest(campaign: Campaign) -> None:
    totals = campaign.bits(step=3)
    assert totals.faults == []
    assert totals.tried == totals.refused + totals.right > 8000


def test_files_of_a_bundle(campaign: Campaign) -> None:
    totals = Totals()
    for number in range(40):
        campaign.bundles(number, totals)
    assert totals.faults == []
    assert totals.tried == totals.refused + totals.right == 40


def test_files_of_a_checkpoint(campaign: Campaign) -> None:
    totals = Totals()
    for number in range(25):
        campaign.checkpoints(number, totals)
    assert totals.faults == []
    assert totals.tried == totals.refused + totals.right + totals.other == 25


def test_the_campaign_sees_what_is_wrong(campaign: Campaign, tmp_path: Path) -> None:
    """Another model's answers, and an error that is not ours."""
    said = campaign._outcome(lambda: ([1], b""), ([2], b""), "x")
    assert said == ("wrong", "x")
    assert campaign._outcome(lambda: 1 // 0, ([2], b""), "x")[0] == "wrong"  # type: ignore[arg-type, return-value]
