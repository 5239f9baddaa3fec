"""Tiles of transformers' image processor, recorded by `campaign.processor`, in every byte."""

from __future__ import annotations

import json

import pytest
from campaign.processor import GOLDEN, Case, digest
from checkpoints import small_config

from internvl_edge.bundle.specs import ModelSpec, Resize
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.kernels import ops
from internvl_edge.runtime.images.preprocess import Tiling, tile_on_host

RECORDED = json.loads(GOLDEN.read_text())["cases"]
CASES = [(Case(**one), tiles) for one in RECORDED if (tiles := one.pop("tiles"))]


def tiling(case: Case, resize: Resize = "torchvision") -> Tiling:
    return Tiling(case.side, 1, case.max_tiles, True, resize)


def test_every_byte_is_that_of_the_processor() -> None:
    wrong = [
        case
        for case, expected in CASES
        if digest(tile_on_host(case.pixels(), tiling(case))[0]) != expected
    ]
    assert len(CASES) == 120
    assert wrong == []


def test_pillows_pixels_are_others() -> None:
    found = [
        digest(tile_on_host(case.pixels(), tiling(case, "pillow"))[0]) == expected
        for case, expected in CASES
    ]
    assert sum(found) < 10


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cpu_kernels", lambda: None)
    small = [(case, expected) for case, expected in CASES if case.width * case.height < 100_000]
    assert len(small) > 30
    for case, expected in small:
        assert digest(tile_on_host(case.pixels(), tiling(case))[0]) == expected, case


def test_older_bundles_keep_pillows() -> None:
    spec = parse_config(small_config())
    written = spec.to_dict()
    assert "resize" not in written["tiling"]
    assert ModelSpec.from_dict(written).tiling.resize == "pillow"
