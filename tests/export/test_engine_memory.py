"""Memory that engines are planned to take: by sequences of a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from checkpoints import GOLDEN

from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bundle.manifest import Bundle, open_bundle
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.tensorrt.profiles import (
    GIB,
    Place,
    attention_bytes,
    limits_of,
    plan_build,
)
from internvl_edge.runtime import LimitError
from internvl_edge.runtime.backends.plans import Limits, Machine
from internvl_edge.runtime.memory import plan_memory

ORIN = Machine(87, "tensorrt", "10.16.2", "Orin (nvgpu)", 13020)
PLACE = Place("Orin", ORIN, 60 * GIB, shared=True)
LIMITS = Limits(context=256, tokens=64)


def plenty() -> int:
    return 1 << 40


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("memory")
    path = export_bundle(GOLDEN / "model", folder / "bundle", dialect="tensorrt-portable")
    return open_bundle(path, verify="size")


def test_each_sequence_of_a_pass_has_a_cache(opened: Bundle) -> None:
    alone, four = (
        plan_build(opened, replace(LIMITS, sequences=count), PLACE, available=plenty)
        for count in (1, 4)
    )
    assert four.kv_cache == 4 * alone.kv_cache
    assert four.activations > alone.activations
    spec = opened.spec
    for count in (0, 257):
        with pytest.raises(LimitError, match=rf"^max_sequences is {count}, outside 1\.\.256"):
            limits_of(spec, None, 256, count)
    with pytest.raises(LimitError, match="lower max_sequences, lower max_context"):
        plan_build(
            opened,
            replace(LIMITS, sequences=4),
            replace(PLACE, usable_bytes=GIB),
            available=plenty,
        )


@pytest.mark.parametrize(
    ("dialect", "sequences", "scratch"),
    [
        ("tensorrt", 1, 79_696_384),
        ("tensorrt", 4, 146_817_536),
        ("tensorrt-portable", 1, 749_731_840),
        ("tensorrt-portable", 4, 2_919_038_976),
    ],
)
def test_attention_takes_no_more_than_is_planned(
    opened: Bundle, dialect: Any, sequences: int, scratch: int
) -> None:
    """Scratch memory as TensorRT for RTX 1.7 tells it of a layer of InternLM2-20B, INT4."""
    manifest = replace(opened.manifest, spec=internvl_1_5(), dialect=dialect, language="int4")
    limits = Limits(4096, sequences=sequences)
    planned = (
        attention_bytes(manifest, limits)
        + plan_memory(
            manifest, tokens=4096, tiles=1, prepared=True, low_memory=True, scores=False
        ).language
    )
    assert scratch < planned < 5 * scratch
