"""Checkpoints in transformers' own layout: the files beside config.json, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scripted import scripted

from internvl_edge.bundle.prompt import NATIVE_TEMPLATE
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.beside import (
    GENERATION,
    PREPROCESSOR,
    PROCESSOR,
    TEMPLATE_JSON,
    TEMPLATE_TEXT,
    TEXT,
    TOKENIZER_CONFIG,
    read_beside,
)
from internvl_edge.export.checkpoint.chat_template import KNOWN
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.tokens import read_tokens
from internvl_edge.runtime import CheckpointError, InternVL, PromptError

FAMILIES = Path(__file__).parents[1] / "families"
MODEL = FAMILIES / "hf_qwen3" / "model"

Files = dict[str, dict[str, Any]]


def files_of(folder: Path) -> Files:
    config = json.loads((folder / "config.json").read_text())
    return {"config.json": config, **copy.deepcopy(dict(read_beside(folder)))}


def describe(files: Files) -> ModelSpec:
    return describe_config(files["config.json"], files).spec


def changed(path: str, value: Any, folder: Path = MODEL) -> Files:
    """Files with one value changed: `file:section.key`."""
    files = files_of(folder)
    file, _, keys = path.partition(":")
    *sections, key = keys.split(".")
    place = files[file]
    for section in sections:
        place = place[section]
    place[key] = value
    return files


def test_both_generations_of_files_say_the_same() -> None:
    """One file with sections, or one for each; theta beside the kind, or within."""
    new, old = describe(files_of(FAMILIES / "hf_qwen2" / "model")), describe(files_of(MODEL))
    assert new.tiling == old.tiling
    assert new.tiling.dynamic
    assert new.tiling.thumbnail
    assert (new.tiling.min_tiles, new.tiling.max_tiles) == (1, 12)
    assert new.prompt.template == old.prompt.template == NATIVE_TEMPLATE
    assert new.vision.ps_version == "v2"
    assert new.language.rope_type == "dynamic"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config.json:vision_config.image_size", 56),
        ("config.json:vision_config.patch_size", 14),
        ("config.json:text_config.architectures", ["Qwen3ForCausalLM"]),
        (f"{PREPROCESSOR}:crop_to_patches", True),
        (f"{PREPROCESSOR}:image_processor_type", "GotOcr2ImageProcessor"),
        (f"{PREPROCESSOR}:rescale_factor", 1 / 255),
        ("config.json:image_token_id", 1),
    ],
)
def test_other_spellings_of_the_same(path: str, value: Any) -> None:
    assert describe(changed(path, value)) == describe(files_of(MODEL))


REFUSED = [
    ("config.json:architectures", ["InternS1ForConditionalGeneration"], "architectures"),
    (
        "config.json:text_config.model_type",
        "gpt_oss",
        "supported: one of internlm3, llama, phi3, qwen2, qwen3",
    ),
    ("config.json:text_config.use_sliding_window", True, "use_sliding_window"),
    ("config.json:text_config.layer_types", ["sliding_attention"] * 2, "layer_types"),
    ("config.json:text_config.quantization_config", {"quant_method": "awq"}, "awq"),
    ("config.json:text_config.anything", 1, "anything"),
    ("config.json:vision_config.use_mean_pooling", False, "use_mean_pooling"),
    ("config.json:vision_config.use_mask_token", True, "use_mask_token"),
    ("config.json:vision_config.image_size", [56, 42], "twice in a list"),
    ("config.json:vision_config.image_size", "56", "twice in a list"),
    ("config.json:projector_hidden_act", "silu", "gelu"),
    ("config.json:vision_feature_select_strategy", "full", "default"),
    ("config.json:vision_feature_layer", [-1, -2], "an integer"),
    ("config.json:image_seq_length", 256, "image_seq_length.*supported: 4"),
    (f"{PREPROCESSOR}:size", {"height": 384, "width": 384}, "height and width 56"),
    (f"{PREPROCESSOR}:image_mean", [0.5, 0.5, 0.5], "image_mean"),
    (f"{PREPROCESSOR}:resample", 2, f"{PREPROCESSOR}: 'resample' is 2; supported: 3"),
    (f"{PREPROCESSOR}:rescale_factor", 1.0, "1/255"),
    (f"{PREPROCESSOR}:do_normalize", False, "do_normalize"),
    (f"{PREPROCESSOR}:image_processor_type", "InternVL3_5ImageProcessor", "GotOcr2ImageProcessor"),
    (f"{PREPROCESSOR}:another", 1, "another"),
    (f"{TEMPLATE_TEXT}:{TEXT}", KNOWN.replace("im_end", "im_stop"), "writes .*im_stop.* here"),
    (f"{TEMPLATE_TEXT}:{TEXT}", "{% for %}", "cannot be rendered"),
    (f"{TEMPLATE_TEXT}:{TEXT}", "{{ messages.__class__.__mro__ }}", "chat template"),
]


@pytest.mark.parametrize(("path", "value", "said"), REFUSED, ids=lambda item: str(item)[:60])
def test_refusals(path: str, value: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        describe(changed(path, value))


def test_no_preprocessing_and_no_template() -> None:
    files = files_of(MODEL)
    del files[PREPROCESSOR]
    with pytest.raises(CheckpointError, match=f"no {PREPROCESSOR} and no image_processor"):
        describe(files)
    files = files_of(MODEL)
    del files[TEMPLATE_TEXT]
    with pytest.raises(CheckpointError, match="has no chat template"):
        describe(files)


@pytest.mark.parametrize(
    "template",
    [
        KNOWN,
        KNOWN.replace("<IMG_CONTEXT>", "<image>"),
        KNOWN.replace("{%", "{%-").replace("%}{%-", "%}\n  {%-"),
        "{# a comment #}" + KNOWN,
    ],
    ids=["as written", "older slot", "whitespace control", "rendered"],
)
@pytest.mark.parametrize("place", [TEMPLATE_TEXT, TEMPLATE_JSON, TOKENIZER_CONFIG, "named"])
def test_a_known_template_in_any_place(template: str, place: str) -> None:
    files = files_of(MODEL)
    del files[TEMPLATE_TEXT]
    named = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": template}]
    stored: dict[str, Files] = {
        TEMPLATE_TEXT: {TEMPLATE_TEXT: {TEXT: template}},
        TEMPLATE_JSON: {TEMPLATE_JSON: {"chat_template": template}},
        TOKENIZER_CONFIG: {TOKENIZER_CONFIG: {"chat_template": template}},
        "named": {TOKENIZER_CONFIG: {"chat_template": named}},
    }
    assert describe(files | stored[place]).prompt.template == NATIVE_TEMPLATE


def test_of_several_templates_the_first_counts() -> None:
    files = files_of(MODEL)
    files[TEMPLATE_JSON] = {"chat_template": "?"}
    describe(files)
    files[TEMPLATE_TEXT] = {TEXT: "?"}
    files[TEMPLATE_JSON] = {"chat_template": KNOWN}
    with pytest.raises(CheckpointError, match="chat template"):
        describe(files)


@pytest.mark.parametrize("file", [PREPROCESSOR, PROCESSOR, GENERATION, TOKENIZER_CONFIG])
def test_damaged_files(tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / file).write_text("{")
    with pytest.raises(CheckpointError, match=file):
        Checkpoint(folder)


@pytest.mark.parametrize(("eos", "accepted"), [(368, True), ([366, 368], True), (366, False)])
def test_the_template_ends_where_generation_does(
    tmp_path: Path, eos: object, accepted: bool
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": eos}))
    spec = Checkpoint(folder).spec
    if accepted:
        read_tokens(folder, spec)
        return
    with pytest.raises(CheckpointError, match=r"'eos_token_id' is 366; '<\|im_end\|>'.* token 368"):
        read_tokens(folder, spec)


@pytest.mark.parametrize(
    ("generation", "decoder", "stops"),
    [
        (368, None, (368,)),
        ([366, 368, 366], 7, (366, 368)),
        ([0, 368], None, (0, 368)),
        (None, 366, (366,)),
        (None, None, ()),
    ],
    ids=str,
)
def test_every_end_of_an_answer(
    generation: object, decoder: object, stops: tuple[int, ...]
) -> None:
    """generation_config.json counts before the decoder's section."""
    files = changed("config.json:text_config.eos_token_id", decoder)
    files[GENERATION] = {"eos_token_id": generation}
    spec = describe(files)
    assert spec.prompt.stop_ids == stops
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("eos", [420, -1, True, "368", [368, 420], [368, None]], ids=str)
def test_ends_the_vocabulary_lacks(eos: object) -> None:
    with pytest.raises(CheckpointError, match=r"'eos_token_id' is .*; supported: token ids in 0.."):
        describe(files_of(MODEL) | {GENERATION: {"eos_token_id": eos}})


def test_any_of_them_ends_an_answer(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": [366, 368, 5]}))
    model, backend = scripted(export_bundle(folder, tmp_path / "bundle"))
    for stop in (5, 366, 368):
        backend.script = [40, stop, 41]
        reply = model.generate("Hello")
        assert (reply.token_ids, reply.finish_reason) == ([40, stop], "stop")
    backend.script = [40, 5, 41]
    assert model.generate("Hello", ignore_eos=True, max_new_tokens=3).token_ids == [40, 5, 41]


def test_the_fast_tokenizer_is_this_layouts(tmp_path: Path) -> None:
    """Beside a SentencePiece model, which is what the original layout takes."""
    folder = Path(shutil.copytree(FAMILIES / "hf_llama" / "model", tmp_path / "model"))
    other = FAMILIES / "orig_llama" / "model" / "tokenizer.model"
    shutil.copyfile(other, folder / "tokenizer.model")
    files = read_tokens(folder, Checkpoint(folder).spec).files
    names = {path.name for path in files}
    assert "tokenizer.json" in names
    assert "tokenizer.model" not in names


def test_a_token_behind_the_table_is_refused_in_a_prompt(tmp_path: Path) -> None:
    """`<video>` has the first id the embedding lacks: reading past the table must not happen."""
    model = FAMILIES / "hf_qwen2" / "model"
    runtime = InternVL.load(export_bundle(model, tmp_path / "bundle"), device="cpu", threads=1)
    with pytest.raises(PromptError, match=r"token ids must be in 0..396"):
        runtime.generate("<video> What happens?", max_new_tokens=1, control_tokens=True)
    runtime.generate("<video> What happens?", max_new_tokens=1)  # text, as any other
