"""The rotary embedding in config.json, as transformers spells it from version to version."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GOLDEN, small_config, write_config

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.runtime import CheckpointError, InternVL

SPELLINGS: dict[str, dict[str, Any]] = {
    "4.37": {"rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "4.45": {"rope_theta": 1000000, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "5 beside": {
        "rope_theta": 1000000,
        "rope_parameters": {
            "rope_type": "dynamic",
            "type": "dynamic",
            "factor": 3.0,
            "rope_theta": 1000000,
        },
    },
    "5 inside": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1000000}},
    "both": {
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 3.0},
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0},
    },
}


def spelt(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """A copy whose rotary embedding is told in another way."""
    config = copy.deepcopy(config)
    for key in ("rope_scaling", "rope_theta"):
        config["llm_config"].pop(key, None)
    config["llm_config"].update(rope)
    return config


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_rope(spelling: str) -> None:
    language = parse_config(spelt(small_config(), **SPELLINGS[spelling])).language
    assert (language.rope_type, language.rope_factor) == ("dynamic", 3.0)
    assert language.rope_theta == 1000000
    assert language.max_context == 1536


def test_a_spelling_of_rope_answers_alike(golden_bundle: Path, tmp_path: Path) -> None:
    """Beyond the trained length, where the scaling is felt."""
    config = json.loads((GOLDEN / "model" / "config.json").read_text(encoding="utf-8"))
    write_config(tmp_path / "checkpoint", spelt(config, **SPELLINGS["5 inside"]))
    weights = GOLDEN / "model" / "model.safetensors"
    (tmp_path / "checkpoint" / weights.name).symlink_to(weights)
    bundle = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    models = [InternVL.load(path, device="cpu", threads=1) for path in (golden_bundle, bundle)]
    ids = models[0].tokenizer.encode("What is it? " * 120)
    assert len(ids) > 512
    first, second = (model.generate(ids, max_new_tokens=4) for model in models)
    assert first.token_ids == second.token_ids
    assert models[1].max_context == 1536


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"rope_theta": 10000, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 10000, "rope_scaling": {"type": "default", "factor": 1.0}},
    ],
    ids=str,
)
def test_no_scaling(rope: dict[str, Any]) -> None:
    language = parse_config(spelt(small_config(), **rope)).language
    assert (language.rope_type, language.rope_factor) == ("default", 1.0)
    assert (language.rope_theta, language.max_context) == (10000, 512)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (
            {"rope_theta": 10000, "rope_parameters": {"rope_theta": 1000000}},
            [
                "'llm_config.rope_theta' is 10000",
                "'llm_config.rope_parameters.rope_theta' is 1000000",
            ],
        ),
        (
            {"rope_parameters": {"rope_type": "spiral", "factor": 3.0}},
            ["'llm_config.rope_parameters.rope_type' is 'spiral'"],
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 3.0}},
            ["'llm_config.rope_scaling.type' is 'linear'", "dynamic"],
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            },
            ["is linear by 2", "is dynamic by 2"],
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 3.0},
            },
            ["is linear by 2", "is linear by 3"],
        ),
        ({"rope_parameters": {"factor": 3.0}}, ["'llm_config.rope_parameters.factor' is 3.0"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["'llm_config.rope_parameters.factor'"]),
        ({"rope_scaling": {"factor": 3.0}}, ["'llm_config.rope_scaling.type'"]),
        (
            {"rope_parameters": {"rope_type": "mrope", "factor": 4.0}},
            ["'llm_config.rope_parameters.rope_type' is 'mrope'", "yarn"],
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            ["lacks 'llm_config.rope_parameters.original_max_position_embeddings'"],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}},
            ["'llm_config.rope_parameters.rope_theta' is '1e6'"],
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_rope_that_is_refused(rope: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(spelt(small_config(), **rope))
    assert all(text in str(caught.value) for text in said), str(caught.value)
