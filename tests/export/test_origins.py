"""Canonical tensors from what is stored: joined, cut, reordered, and what they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN, checkpoint_shapes, small_config, write_checkpoint
from numpy.typing import NDArray
from safetensors.numpy import load_file

from internvl_edge.bundle.contract import stored_name
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint import checkpoint as checkpoint_module
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.checkpoint.family import known_families
from internvl_edge.export.checkpoint.names import EMBEDDING, HEAD, model_part, tensor_shapes
from internvl_edge.export.checkpoint.origin import (
    Origin,
    Rows,
    cut,
    joined,
    read_as_stored,
    read_in_order,
    reordered,
    stored_shapes,
    whole,
)
from internvl_edge.export.inspection import parameter_counts
from internvl_edge.runtime import BundleError, CheckpointError

STORED = {"a": np.arange(6).reshape(3, 2), "b": np.arange(6, 10).reshape(2, 2)}
ORIGINS = [
    (whole("a"), STORED["a"]),
    (joined({"b": 2, "a": 3}), np.concatenate([STORED["b"], STORED["a"]])),
    (cut("a", 1, 3), STORED["a"][1:3]),
    (reordered("a", np.array([2, 0, 1])), STORED["a"][[2, 0, 1]]),
    (
        Origin((Rows("b", 0, 2), Rows("a", 0, 2)), np.array([1, 0])),
        np.concatenate([STORED["b"][::-1], STORED["a"][1::-1]]),
    ),
    (
        Origin((Rows("a"), Rows("b", 0, 2)), np.array([4, 0, 3, 1, 2])),
        np.concatenate([STORED["a"], STORED["b"]])[[4, 0, 3, 1, 2]],
    ),
]


def _rows(part: Rows) -> Any:
    """One row at a time."""
    values: NDArray[Any] = STORED[part.name][part.start : part.stop]
    return iter(np.split(values, len(values)))


@pytest.mark.parametrize(("origin", "expected"), ORIGINS)
def test_values(origin: Origin, expected: NDArray[Any]) -> None:
    np.testing.assert_array_equal(np.concatenate(list(read_in_order(origin, _rows))), expected)
    stored = np.concatenate(list(read_as_stored(origin, _rows)))
    order = np.arange(len(stored)) if origin.order is None else origin.order
    runs = np.split(stored, len(stored) // len(order))
    np.testing.assert_array_equal(np.concatenate([run[order] for run in runs]), expected)


def test_what_is_reordered_in_runs_streams_run_by_run() -> None:
    """Of 128 experts one is held, not all."""
    origin = Origin((Rows("a", 0, 2), Rows("b"), Rows("a", 1, 3)), np.array([1, 0]))
    assert [len(block) for block in read_in_order(origin, _rows)] == [2, 2, 2]


def test_shapes_of_what_is_stored() -> None:
    """A fused matrix is as long as the last of its parts; a joined one is each of them."""
    table = {"x": cut("ab", 0, 3), "y": cut("ab", 3, 5), "z": joined({"p": 4, "q": 2})}
    shapes = {"x": (3, 7), "y": (2, 7), "z": (6, 5)}
    assert stored_shapes(table, shapes) == {"ab": (5, 7), "p": (4, 5), "q": (2, 5)}


def test_a_joined_tensor_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held at a time is a run of rows, whatever the tensor's size."""
    config = small_config(hidden=64)
    source = Checkpoint(write_checkpoint(tmp_path / "model", config))
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 8 * 64 * 4)
    assert {len(block) for block in source.blocks("layers.0.gate.weight")} == {8}
    assert {len(block) for block in source.as_stored("layers.0.qkv.weight")} == {8}
    values = np.concatenate(list(source.as_stored("layers.0.qkv.weight")))
    (ordered,) = source.blocks("layers.0.qkv.weight")
    np.testing.assert_array_equal(values[source.order("layers.0.qkv.weight")], ordered)


def test_bundles_keep_the_names_of_the_first_family() -> None:
    """Prepared weights, reports and `--keep-fp16` of bundles that exist depend on them."""
    spec = parse_config(json.loads((GOLDEN / "model" / "config.json").read_text()))
    names = {stored_name(name) for name in tensor_shapes(spec)}
    assert names == set(load_file(GOLDEN / "model" / "model.safetensors"))


def test_names_that_begin_so() -> None:
    prefixes = {
        "vision.layers.3.": "vision_model.encoder.layers.3.",
        "projector.": "mlp1.",
        "layers.3.": "language_model.model.layers.3.",
        "head.": "language_model.output.",
        "dims.1x2": "dims.1x2",
        "cache.0.key.scales": "cache.0.key.scales",
    }
    assert {name: stored_name(name) for name in prefixes} == prefixes


def test_parts() -> None:
    names = tensor_shapes(parse_config(small_config()))
    counted = dict.fromkeys(("vision", "projector", "language"), 0)
    for name in names:
        counted[model_part(name)] += 1
    stored = checkpoint_shapes(small_config())
    begins = {"vision": "vision_model.", "projector": "mlp1.", "language": "language_model."}
    assert counted == {part: sum(n.startswith(b) for n in stored) for part, b in begins.items()}


@pytest.mark.parametrize("told", [True, False])
def test_a_stored_head_is_used_whatever_the_config_says(tmp_path: Path, told: bool) -> None:
    """Released files say tied beside a matrix of their own."""
    config = small_config(layers=1, vision_layers=1)
    folder = write_checkpoint(tmp_path / "model", config)
    config["llm_config"]["tie_word_embeddings"] = told
    (folder / "config.json").write_text(json.dumps(config))
    source = Checkpoint(folder)
    assert not source.spec.language.tied_head
    assert (next(source.blocks(HEAD)) != next(source.blocks(EMBEDDING))).any()


def test_a_head_that_is_not_stored_is_the_table_if_the_config_says_so(tmp_path: Path) -> None:
    config = small_config(layers=1, vision_layers=1)
    config["llm_config"]["tie_word_embeddings"] = True
    folder = write_checkpoint(tmp_path / "model", config)
    source = Checkpoint(folder)
    assert source.spec.language.tied_head
    np.testing.assert_array_equal(next(source.blocks(HEAD)), next(source.blocks(EMBEDDING)))
    table = 512 * 64
    untied = parse_config(small_config(layers=1, vision_layers=1))
    assert parameter_counts(untied)["total"] == parameter_counts(source.spec)["total"] + table
    config["llm_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: language_model.output"):
        Checkpoint(folder)


def test_families_are_found() -> None:
    assert {name for family in known_families() for name in family.architectures} >= {
        "InternLM2ForCausalLM",
        "LlamaForCausalLM",
    }


def test_a_bundle_of_before_a_field_has_its_default() -> None:
    """What was written without the field reads as it ran; a new value is written and read."""
    spec = parse_config(small_config())
    told = json.loads(json.dumps(spec.to_dict()))
    assert "qkv_bias" not in told["language"]
    assert ModelSpec.from_dict(told) == spec
    told["language"]["qkv_bias"] = True
    changed = ModelSpec.from_dict(told)
    assert changed.language.has_qkv_bias
    assert changed.to_dict() == told
    for value in (1, "true", None):
        with pytest.raises(BundleError, match=r"spec.language.qkv_bias is .*, expected true"):
            ModelSpec.from_dict({**told, "language": {**told["language"], "qkv_bias": value}})
    with pytest.raises(BundleError, match=r"missing or unknown fields: .*qkv_biases"):
        ModelSpec.from_dict({**told, "language": {**told["language"], "qkv_biases": True}})
