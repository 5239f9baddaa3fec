"""What generation_config.json has an answer be made with, beside what transformers reads in it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import scripted
from transformers import GenerationConfig

from internvl_edge.bundle.specs import GenerationSpec, ModelSpec
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.beside import GENERATION
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.generation import read_generation
from internvl_edge.runtime import (
    BundleError,
    CheckpointError,
    CheckpointWarning,
    InternVL,
    Sampling,
)

FAMILIES = Path(__file__).parents[1] / "families"
DRAWN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Told = dict[str, Any]
Bundled = Callable[[Told], Path]


@pytest.fixture(params=["hf_qwen3", "orig_qwen3"])
def bundled(request: pytest.FixtureRequest, tmp_path: Path) -> Bundled:
    """Export a checkpoint of either layout with another generation_config.json."""

    def export(told: Told) -> Path:
        folder = Path(shutil.copytree(FAMILIES / request.param / "model", tmp_path / "model"))
        (folder / GENERATION).write_text(json.dumps({"eos_token_id": 368, **told}))
        return export_bundle(folder, tmp_path / "bundle")

    return export


@pytest.mark.parametrize(
    "told",
    [
        DRAWN,
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "top_p": 1, "min_p": 0.05},
        {"do_sample": True, "top_k": None, "temperature": 2, "repetition_penalty": 1.05},
        {"do_sample": True, "max_new_tokens": 77, "min_p": 0},
    ],
    ids=str,
)
def test_what_a_file_that_samples_says(told: Told) -> None:
    """Where it is silent, transformers' defaults count."""
    theirs = GenerationConfig(**told)
    defaults = {"min_p": 0.0, **GenerationConfig._get_default_generation_params()}
    expected = {
        name: defaults[name] if (value := getattr(theirs, name)) is None else value
        for name in SAMPLED
    }
    spec = read_generation({GENERATION: told})
    assert {name: getattr(spec, name) for name in SAMPLED} == expected
    assert spec.max_new_tokens == theirs.max_new_tokens


@pytest.mark.parametrize("told", [{}, {"do_sample": False}, {"do_sample": None}], ids=str)
def test_other_files_are_greedy(told: Told) -> None:
    spec = read_generation({GENERATION: {**DRAWN, "do_sample": None, "max_new_tokens": 9, **told}})
    assert spec == GenerationSpec() == read_generation({})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", "yes"),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.5),
        ("top_p", 0),
        ("min_p", -0.1),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
    ],
)
def test_what_cannot_be_drawn_with_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^{GENERATION}: '{key}' is .*; supported: "):
        read_generation({GENERATION: {**DRAWN, key: value}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", [[7]]),
        ("forced_eos_token_id", 7),
        ("guidance_scale", 1.5),
        ("min_length", 5),
        ("num_beams", 4),
        ("something_new", 0.5),
        ("suppress_tokens", [7]),
    ],
)
@pytest.mark.parametrize("drawn", [True, False])
def test_what_would_change_answers_is_named(key: str, value: object, drawn: bool) -> None:
    told = {**(DRAWN if drawn else {}), key: value}
    with pytest.warns(CheckpointWarning, match=rf"^{GENERATION}: '{key}' .*: left out$"):
        read_generation({GENERATION: told})


def test_a_penalty_of_greedy_answers_is_named() -> None:
    """It counts with `do_sample` alone, as all of the file."""
    with pytest.warns(CheckpointWarning, match=r": 'repetition_penalty' 1.1 would change answers"):
        read_generation({GENERATION: {"repetition_penalty": 1.1, "temperature": 0.1}})


@pytest.mark.parametrize("drawn", [True, False])
def test_transformers_own_defaults_are_none_of_these(drawn: bool) -> None:
    silent = GenerationConfig(do_sample=drawn).to_dict()
    spelled = {**silent, **GenerationConfig._get_default_generation_params(), "do_sample": drawn}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_generation({GENERATION: spelled}) == read_generation({GENERATION: silent})


def test_a_bundle_keeps_what_it_says(bundled: Bundled) -> None:
    path = bundled({**DRAWN, "max_new_tokens": 5})
    model = InternVL.load(path, device="cpu", threads=1)
    assert model.sampling == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    told = {"seed": 3}
    drawn = model.generate("Hello", sampling=told, ignore_eos=True)
    assert len(drawn.token_ids) == 5
    hot = Sampling(temperature=0.6, top_k=20, top_p=0.95, seed=3)
    again = model.generate("Hello", sampling=hot, ignore_eos=True)
    assert again.token_ids == drawn.token_ids
    greedy = model.generate("Hello", sampling=Sampling(), ignore_eos=True, max_new_tokens=7)
    assert greedy.token_ids[:5] != drawn.token_ids
    assert len(greedy.token_ids) == 7
    assert model.chat().send("Hello", sampling=told, ignore_eos=True).token_ids == drawn.token_ids


def test_a_bundle_of_a_silent_checkpoint_says_nothing(bundled: Bundled) -> None:
    path = bundled({})
    assert "generation" not in json.loads((path / "bundle.json").read_text())["spec"]
    assert InternVL.load(path, device="cpu", threads=1).sampling == Sampling()


def test_what_is_damaged_in_a_bundle_is_refused() -> None:
    spec = Checkpoint(FAMILIES / "hf_qwen3" / "model").spec.to_dict()
    for told, named in (
        ({"temperature": -1.0}, r"spec.generation.temperature is -1.0, expected a positive number"),
        ({"top_p": 1.5}, r"generation.top_p is 1.5, expected at most 1"),
        ({"heat": 1.0}, r"unknown fields: \['heat'\]"),
        (None, r"no object 'generation'"),
    ):
        with pytest.raises(BundleError, match=named):
            ModelSpec.from_dict({**spec, "generation": told})


def test_ends_of_other_models(bundled: Bundled) -> None:
    """A fine-tune may have learnt one of them; the reference goes on."""
    model, backend = scripted(bundled({}))
    others = model.inputs.extra_stop_ids
    end = model.tokenizer.token_id("<|endoftext|>")
    assert end in others
    assert end not in model.inputs.stop_ids
    for token in others:
        backend.script = [40, token, 41]
        reply = model.generate("Hello")
        assert (reply.token_ids, reply.finish_reason) == ([40, token], "stop")
        assert model.chat().send("Hello").token_ids == [40, token]
    backend.script = [40, end, 41]
    whole = model.generate("Hello", extra_stops=False)
    assert whole.token_ids == [40, end, 41, model.stop_id]
