"""Published checkpoints: their configs parse, and have as many parameters as was published."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.bench.estimate.run import Wish, resolve
from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.bench.scale.models_table import models_table
from internvl_edge.bundle.errors import LimitError
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.checkpoint.origin import stored_shapes
from internvl_edge.export.inspection import RECIPES, parameter_counts
from internvl_edge.export.sizes import bundle_bytes
from internvl_edge.runtime import CheckpointError

#: Billions of parameters as published on the model cards, where names round more.
PUBLISHED = {
    "internvl-chat-v1-2": 40.1,
    "internvl2-1b": 0.94,
    "internvl2_5-4b": 3.71,
    "internvl2_5-38b": 38.4,
    "internvl2_5-78b": 78.4,
    "internvl3-2b": 2.09,
    "internvl3-8b": 7.94,
    "internvl3-9b": 9.14,
    "internvl3-14b": 15.1,
    "internvl3_5-1b": 1.06,
    "internvl3_5-2b": 2.35,
    "internvl3_5-4b": 4.73,
    "internvl3_5-8b": 8.53,
    "internvl3_5-14b": 15.1,
    "internvl3_5-38b": 38.4,
    "internvl3_5-30b-a3b": 30.8,
    "internvl3_5-241b-a28b": 240.7,
    "mini-internvl-chat-4b-v1-5": 4.15,
    "internvl2-4b": 4.15,
    "internvl2-llama3-76b": 76.3,
    "internvl2-40b": 40.1,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name: str) -> None:
    spec = describe_config(CONFIGS[name]).spec
    counted = parameter_counts(spec)["total"] / 1e9
    if name in PUBLISHED:
        assert counted == pytest.approx(PUBLISHED[name], rel=0.012)
    elif told := re.search(r"(\d+)b(-|$)", name):
        assert counted == pytest.approx(float(told[1]), rel=0.11)


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_and_sizes(name: str) -> None:
    """As many values are stored as canonical tensors have, and every precision has a size."""
    described = describe_config(CONFIGS[name])
    shapes = tensor_shapes(described.spec)
    stored = stored_shapes(described.tensors(), shapes)
    assert _values(stored) == _values(shapes)
    sizes = [sum(bundle_bytes(described.spec, recipe).values()) for recipe in RECIPES.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 4 * _values(shapes) * 0.99


def _values(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        size = 1
        for dim in shape:
            size *= dim
        total += size
    return total


def test_the_table_of_the_docs() -> None:
    """It is what `python -m internvl_edge.bench.scale.models_table` prints."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert models_table() in text


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llm_config", {"architectures": ["GptOssForCausalLM"]}, "GptOssForCausalLM"),
    ("llm_config", {"architectures": ["InternLM2VEForCausalLM"]}, "InternLM2VEForCausalLM"),
    ("llm_config", {"quantization_config": {"quant_method": "awq"}}, "quantised with 'awq'"),
    ("llm_config", {"rope_pos_id_version": "v2pe_fix"}, "rope_pos_id_version"),
    ("llm_config", {"use_sliding_window": True}, "use_sliding_window"),
    ("", {"flash_mode": True}, "flash_mode"),
    ("", {"pad2square": True}, "pad2square"),
    ("", {"model_type": "interns1"}, "interns1"),
    ("", {"architectures": ["InternVLModel"]}, "InternVLModel"),
]


@pytest.mark.parametrize(("section", "changed", "said"), REFUSED, ids=lambda item: str(item)[:50])
def test_cousins_are_refused_by_name(section: str, changed: dict[str, Any], said: str) -> None:
    config = copy.deepcopy(dict(CONFIGS["internvl3_5-8b"]))
    (config[section] if section else config).update(changed)
    with pytest.raises(CheckpointError, match=said):
        describe_config(config)


def test_an_estimate_of_experts_is_refused() -> None:
    """Every weight would count as read for every token."""
    wish = Wish(None, None, None, 1, 100, None, 128, None, None)
    with pytest.raises(LimitError, match="of a decoder with experts a token reads a few"):
        resolve("internvl3_5-30b-a3b", wish)
