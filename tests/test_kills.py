"""Short slices of the campaigns of commands ended at random moments: `campaign.kills`, `.chats`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from campaign import chats
from campaign.kills import Campaign, Totals, opened

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kills")]
#: Killed, interrupted, a file that may not grow, two at once, a disk that fills up.
TRIES = {
    "export": (0, 3),
    "calibrate": (0, 1, 3, 4),
    "prepare": (2, 3, 4),
    "build": (0, 2),
}


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    with opened(seed=1) as started:
        yield started


@pytest.mark.parametrize("command", TRIES)
def test_what_is_there_is_whole_or_nothing_of_its_kind(campaign: Campaign, command: str) -> None:
    totals = Totals()
    for number in TRIES[command]:
        campaign.try_once(command, number, totals)
    assert totals.faults == []
    assert totals.tried == totals.right + totals.refused == len(TRIES[command])


def test_what_a_folder_of_rows_meets_costs_no_answer() -> None:
    """Once each: killed, interrupted, a file that may not grow, two at once, a full disk."""
    totals = Totals()
    with chats.opened(seed=1) as campaign:
        for number in range(5):
            campaign.try_once(number, totals)
    assert totals.faults == []
    assert totals.tried == totals.right + totals.refused == 5
    assert totals.right >= 2  # those whose folder alone was in trouble
