"""Checkpoints as people first bring them: read, or refused with what helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN
from safetensors.numpy import load_file, save_file

from internvl_edge.bundle.contract import LANGUAGE_FILES, VISION_FILES
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.inspection import inspect_checkpoint
from internvl_edge.runtime import BundleError, CheckpointError, ImageError
from internvl_edge.runtime.images.decode import load_image

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        export_bundle(checkpoint, checkpoint.parent / "bundle")
    assert not (checkpoint.parent / "bundle").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(checkpoint: Path, **more: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | more))


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer_config.json", "model.safetensors", "config.json"]
)
def test_a_git_lfs_pointer_is_called_one(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(POINTER)
    message = refusal(checkpoint)
    assert f"{name}: it is a Git LFS pointer, not the file it stands for; run 'git lfs" in message


def test_pointers_among_shards_and_fast_tokenizers(checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model-00001-of-00001.safetensors").write_bytes(POINTER)
    assert "00001.safetensors: it is a Git LFS pointer" in refusal(checkpoint)
    shutil.copytree(GOLDEN / "model", checkpoint, dirs_exist_ok=True)
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "tokenizer.model").unlink()
    (checkpoint / "tokenizer.json").write_bytes(POINTER)
    assert "tokenizer.json: it is a Git LFS pointer" in refusal(checkpoint)


@pytest.mark.parametrize("name", [VISION_FILES[0], LANGUAGE_FILES[-1], "tokenizer.model"])
def test_pointers_in_a_bundle(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(POINTER)
    with pytest.raises(BundleError, match=f"{name}: it is a Git LFS pointer"):
        open_bundle(bundle)


def test_a_picture_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(POINTER)
    with pytest.raises(ImageError, match="it is a Git LFS pointer"):
        load_image(tmp_path / "a.png")


def test_an_adapter_alone(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(checkpoint).endswith(
        "is a LoRA adapter; merge it into its base model and export that"
    )
    with pytest.raises(CheckpointError, match="is a LoRA adapter"):
        inspect_checkpoint(checkpoint)


def test_rotary_frequencies_that_are_stored_are_ignored(
    checkpoint: Path, golden_bundle: Path
) -> None:
    state = load_file(checkpoint / "model.safetensors")
    for layer in range(2):
        name = f"language_model.model.layers.{layer}.attention.rotary_emb.inv_freq"
        state[name] = np.ones(4, np.float32)
    save_file(state, checkpoint / "model.safetensors")
    exported = open_bundle(export_bundle(checkpoint, checkpoint.parent / "bundle"))
    assert exported.manifest.files == open_bundle(golden_bundle).manifest.files
    state["language_model.model.rotary_emb.other"] = np.ones(4, np.float32)
    save_file(state, checkpoint / "model.safetensors")
    shutil.rmtree(checkpoint.parent / "bundle")
    assert "1 tensors are not part of the architecture" in refusal(checkpoint)


def test_a_byte_order_mark_and_architectures_that_are_null(
    checkpoint: Path, golden_bundle: Path
) -> None:
    rewrite(checkpoint, architectures=None)
    for path in checkpoint.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    exported = open_bundle(export_bundle(checkpoint, checkpoint.parent / "bundle"))
    assert exported.spec == open_bundle(golden_bundle).spec


def test_a_decoder_whose_architecture_is_null_is_told_what_to_write(checkpoint: Path) -> None:
    llm = json.loads((checkpoint / "config.json").read_text("utf-8"))["llm_config"]
    rewrite(checkpoint, llm_config=llm | {"architectures": None})
    message = refusal(checkpoint)
    assert "'llm_config.architectures' is None; supported: ['InternLM2ForCausalLM'] or" in message


def test_a_checkpoint_that_is_quantised(checkpoint: Path) -> None:
    for method in ("awq", "gptq", "bitsandbytes", "fp8"):
        rewrite(checkpoint, quantization_config={"quant_method": method})
        message = refusal(checkpoint)
        assert f"already quantised with '{method}'" in message
        assert message.endswith("export the original checkpoint, the 16-bit one")


@pytest.mark.parametrize(
    "suffix", ["qweight", "SCB", "weight.quant_state.bitsandbytes__nf4", "weight_scale_inv"]
)
def test_a_checkpoint_that_is_quantised_and_says_so_nowhere(checkpoint: Path, suffix: str) -> None:
    """Its weights have other names, or more of them, which were called missing or unknown."""
    state = load_file(checkpoint / "model.safetensors")
    name = "language_model.model.layers.0.attention.wqkv"
    state[f"{name}.{suffix}"] = state.pop(f"{name}.weight")
    save_file(state, checkpoint / "model.safetensors")
    message = refusal(checkpoint)
    assert f"the weights are already quantised: the checkpoint holds {name}.{suffix}; " in message
    assert message.endswith("export the original checkpoint, the 16-bit one")


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").unlink()
    message = refusal(checkpoint)
    assert "has no tokenizer: copy tokenizer.model or tokenizer.json or vocab.json and merges" in (
        message
    )
