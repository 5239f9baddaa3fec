"""A slice of the campaign of true widths; see `campaign.widths`."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign.widths import Agreement, compare, decoders, row

from internvl_edge.bench.scale.members import CONFIGS

MODELS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.slow(seconds=20)
def test_the_narrowest(tmp_path: Path) -> None:
    """One of each of three families."""
    families = {}
    for decoder in sorted(decoders(), key=lambda found: found.parameters):
        families.setdefault(decoder.decoder["architectures"][0], decoder)
    for decoder in list(families.values())[:3]:
        folder = tmp_path / decoder.members[0]
        folder.mkdir()
        agreement = compare(decoder, folder)
        assert agreement.holds, (decoder.members, agreement)


def test_every_member_is_of_one_decoder() -> None:
    members = [name for decoder in decoders() for name in decoder.members]
    assert sorted(members) == sorted(CONFIGS)


def test_the_page_lists_every_decoder() -> None:
    """With what a run printed: all but the figures is as it would be printed now."""
    text = MODELS.read_text(encoding="utf-8")
    for decoder in decoders():
        beginning, *_ = row(decoder, Agreement(0, 0, 0)).rsplit("| ", 3)
        assert beginning in text


def test_disagreement_is_seen() -> None:
    assert Agreement(4, 1e-5, 1e-5).holds
    assert not Agreement(4, 1e-2, 1e-5).holds
    assert not Agreement(4, 1e-5, 1e-2).holds
    assert not Agreement(0, 0, 0).holds
