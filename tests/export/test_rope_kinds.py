"""Every kind of rotary embedding, from config.json to the tables, against transformers' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config

from internvl_edge.bundle.rope import rope_base, rope_rows
from internvl_edge.bundle.specs import LanguageSpec, ModelSpec
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.runtime import BundleError, CheckpointError

VECTORS = json.loads((Path(__file__).parents[1] / "families" / "rope_vectors.json").read_text())
#: Their numbers are float32's.
NOISE = 1e-6


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """A whole config whose decoder rotates so."""
    config = small_config(heads=2, kv_heads=1, hidden=2 * case["head_dim"])
    del config["llm_config"]["rope_theta"], config["llm_config"]["rope_scaling"]
    config["llm_config"] |= {
        "max_position_embeddings": case["max_position_embeddings"],
        "rope_parameters": {"rope_type": case["kind"], **case["parameters"]},
    }
    return config


def spec_of(case: dict[str, Any]) -> LanguageSpec:
    """Through a bundle's JSON, as the runtime gets it."""
    spec = parse_config(config_of(case))
    return ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))).language


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['kind']}-{case['length']}")
def test_tables(case: dict[str, Any]) -> None:
    spec, length = spec_of(case), case["length"]
    base = rope_base(spec, length)
    cos, sin = rope_rows(spec, base, 1, 2)
    angles = np.arctan2(sin[0], cos[0])
    np.testing.assert_allclose(angles, case["inv_freq"], rtol=NOISE)
    np.testing.assert_allclose(np.hypot(sin, cos), case["attention_factor"], rtol=NOISE)
    last, _ = rope_rows(spec, base, length - 1, length)
    # Written with six digits, and the angle itself is rounded to float32 there.
    noise = 5e-6 + length * 2.0**-23
    np.testing.assert_allclose(last[0], case["cos_last_position"], atol=noise)


def test_every_kind_is_there() -> None:
    kinds = {"default", "linear", "dynamic", "llama3", "longrope", "yarn"}
    assert {case["kind"] for case in VECTORS} == kinds


def longrope(**changed: Any) -> dict[str, Any]:
    case = next(case for case in VECTORS if case["kind"] == "longrope")
    config = config_of(case)
    config["llm_config"]["rope_parameters"] |= changed
    return config


def test_the_old_name_of_longrope() -> None:
    assert parse_config(longrope(rope_type="su")) == parse_config(longrope())


def test_the_original_length_beside_counts_before_the_one_inside() -> None:
    config = longrope()
    config["llm_config"]["original_max_position_embeddings"] = 100
    language = parse_config(config).language
    assert language.rope_original == 100
    assert rope_base(language, 100) > 0 > rope_base(language, 101)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"short_factor": [1.0] * 3}, r"short_factor.* supported: a list of 16 numbers"),
        ({"short_factor": [1.0] * 15 + ["2"]}, "a list of positive numbers"),
        ({"long_factor": [1.0] * 15 + [0]}, "a list of positive numbers"),
        ({"long_factor": 2.0}, "a list of positive numbers"),
    ],
)
def test_factors_that_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse_config(longrope(**changed))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rope_frequencies", [1.0], "1 frequencies, expected 16"),
        ("rope_frequencies", [-1.0] * 16, "a list of positive numbers"),
        ("rope_frequencies", "abc", "a list of positive numbers"),
        ("rope_original", 0, "a positive integer"),
        ("rope_attention", 0, "a positive number"),
        ("rope_type", "linear", "16 frequencies, expected 0"),
    ],
)
def test_a_damaged_bundle_is_refused(field: str, value: Any, said: str) -> None:
    told = json.loads(json.dumps(parse_config(longrope()).to_dict()))
    told["language"][field] = value
    with pytest.raises(BundleError, match=said):
        ModelSpec.from_dict(told)
