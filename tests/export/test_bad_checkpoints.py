"""Bad checkpoints: each is refused with one clear error, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BF16, random_state, small_config, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.runtime import CheckpointError, ExportError, InternVLEdgeError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WQKV = "language_model.model.layers.1.attention.wqkv.weight"

State = dict[str, NDArray[Any]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config(), shards=3)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights file is overwritten again and again."""
    return write_checkpoint(tmp_path_factory.mktemp("fuzzed") / "checkpoint", small_config())


def refusal(checkpoint: Path, error: type[InternVLEdgeError] = CheckpointError) -> str:
    """Export must fail with `error`, in one line, leaving nothing; return the message."""
    before = sorted(os.listdir(checkpoint.parent))
    with pytest.raises(error) as caught:
        export_bundle(checkpoint, checkpoint.parent / "bundle")
    assert sorted(os.listdir(checkpoint.parent)) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def resave(checkpoint: Path, change: Callable[[State], None]) -> None:
    """Rewrite the weights after `change`."""
    state = load_file(checkpoint / WEIGHTS)
    change(state)
    save_file(state, checkpoint / WEIGHTS)


def header_end(path: Path) -> int:
    """Where the tensor data of a safetensors file begins."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# Files that are not there, or not what they say.


def test_missing_directory(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path / "nowhere")


def test_file_instead_of_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    assert "config.json" in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[1]", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "not UTF-8", "a list", "deep", "huge number"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
def test_broken_json(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    assert name in refusal(checkpoint)


@pytest.mark.parametrize("keep", ["nothing", "length", "half the header", "header", "all but one"])
def test_truncated_safetensors(checkpoint: Path, keep: str) -> None:
    path = checkpoint / WEIGHTS
    end = header_end(path)
    sizes = {
        "nothing": 0,
        "length": 8,
        "half the header": end // 2,
        "header": end,
        "all but one": path.stat().st_size - 1,
    }
    os.truncate(path, sizes[keep])
    message = refusal(checkpoint)
    assert WEIGHTS in message
    assert "download it again" in message


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64, (1 << 60).to_bytes(8, "little")]
    + [len(header).to_bytes(8, "little") + header for header in (b"[]", b"{}x", b'{"a": 1}')],
    ids=["LFS pointer", "all ones", "huge header", "a list", "rest", "no offsets"],
)
def test_corrupt_safetensors(checkpoint: Path, content: bytes) -> None:
    (checkpoint / WEIGHTS).write_bytes(content)
    refusal(checkpoint)


def test_data_behind_the_tensors(checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    assert WEIGHTS in refusal(checkpoint)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_altered_header_is_read_or_refused(fuzzed: Path, data: st.DataObject) -> None:
    path = fuzzed / WEIGHTS
    original = path.read_bytes()
    at = data.draw(st.integers(0, header_end(path) - 1), label="position")
    value = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(original[:at] + bytes([value]) + original[at + 1 :])
    try:
        Checkpoint(fuzzed)
    except CheckpointError:
        pass
    finally:
        path.write_bytes(original)


# Tensors.


def test_missing_tensor(checkpoint: Path) -> None:
    resave(checkpoint, lambda state: state.pop(WQKV))
    assert refusal(checkpoint) == f"1 tensors are missing: {WQKV}"


def test_many_missing_tensors_are_counted(checkpoint: Path) -> None:
    def drop(state: State) -> None:
        for name in [name for name in state if name.startswith("language_model.")]:
            del state[name]

    resave(checkpoint, drop)
    assert refusal(checkpoint).endswith(", ...")


def test_extra_tensor(checkpoint: Path) -> None:
    resave(checkpoint, lambda state: state.update(head=np.zeros(3, BF16)))
    assert refusal(checkpoint).endswith("not part of the architecture in config.json: head")


@pytest.mark.parametrize("shape", [(), (8192,), (64, 128), (1, 128, 64), (0, 64)], ids=str)
def test_misshapen_tensor(checkpoint: Path, shape: tuple[int, ...]) -> None:
    resave(checkpoint, lambda state: state.update({WQKV: np.zeros(shape, BF16)}))
    assert f"{WQKV} is {list(shape)}, config.json implies [128, 64]" in refusal(checkpoint)


@pytest.mark.parametrize("dtype", ["int8", "int64", "float64", "bool"])
def test_tensor_of_another_type(checkpoint: Path, dtype: str) -> None:
    resave(checkpoint, lambda state: state.update({WQKV: np.zeros((128, 64), dtype)}))
    assert "supported: ('F32', 'F16', 'BF16')" in refusal(checkpoint)


def test_config_of_another_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(small_config(layers=3)))
    assert "language_model.model.layers.2." in refusal(checkpoint)


# The index of a sharded checkpoint.


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "..",
        "",
        "pytorch_model-00001-of-00002.bin",
        "model\0.safetensors",
        None,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_index_pointing_elsewhere(sharded: Path, file: object) -> None:
    shutil.copyfile(sharded / "model-00001-of-00003.safetensors", sharded.parent / WEIGHTS)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][WQKV] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"puts {WQKV} into" in refusal(sharded)


@pytest.mark.parametrize("content", [{}, {"weight_map": None}, {"weight_map": []}], ids=str)
def test_index_without_map(sharded: Path, content: object) -> None:
    (sharded / INDEX).write_text(json.dumps(content))
    assert "has no 'weight_map'" in refusal(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(sharded)


def test_index_naming_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    here = index["weight_map"][WQKV]
    other = next(file for file in index["weight_map"].values() if file != here)
    index["weight_map"][WQKV] = other
    (sharded / INDEX).write_text(json.dumps(index))
    assert refusal(sharded) == f"{other} lacks {WQKV}, which {INDEX} puts there"


# Weights in a form that is not read.


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_unopened(checkpoint: Path, name: str) -> None:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / name).write_bytes(pickle.dumps(_Bomb(checkpoint / "exploded")))
    assert "convert to safetensors first" in refusal(checkpoint)
    assert not (checkpoint / "exploded").exists()


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    assert f"has neither {WEIGHTS} nor {INDEX}" in refusal(checkpoint)


def test_lora_adapter_directory(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refusal(checkpoint)


@pytest.mark.parametrize("key", ["use_backbone_lora", "use_llm_lora"])
def test_lora_in_the_config(checkpoint: Path, key: str) -> None:
    (checkpoint / "config.json").write_text(json.dumps(small_config(**{key: 16})))
    assert "merge the LoRA weights" in refusal(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        f"language_model.base_model.model.{WQKV}.lora_A.weight",
        "base_model.model.vision_model.encoder.layers.0.attn.qkv.weight",
    ],
)
def test_lora_tensors(checkpoint: Path, name: str) -> None:
    resave(checkpoint, lambda state: state.update({name: np.zeros((16, 64), BF16)}))
    assert "unmerged LoRA tensors" in refusal(checkpoint)


# Values.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "vision_model.embeddings.position_embedding",
        "vision_model.encoder.layers.1.mlp.fc2.bias",
        "mlp1.3.weight",
        WQKV,
        "language_model.model.tok_embeddings.weight",
    ],
)
def test_weights_that_are_not_finite(checkpoint: Path, name: str, value: float) -> None:
    def spoil(state: State) -> None:
        state[name].reshape(-1)[-1] = value

    resave(checkpoint, spoil)
    message = refusal(checkpoint)
    assert message.startswith(f"{name} holds NaN or infinite values")
    assert "download it again" in message


@pytest.mark.parametrize(("vision", "language"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_weights_beyond_fp16(tmp_path: Path, vision: Any, language: Any) -> None:
    name = "mlp1.1.weight" if vision == "fp16" else WQKV
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())

    def enlarge(state: State) -> None:
        state[name].reshape(-1)[0] = 70_000

    resave(checkpoint, enlarge)
    with pytest.raises(ExportError, match=rf"{name} reaches 70.*65504.*export this part as fp32"):
        export_bundle(checkpoint, tmp_path / "bundle", vision=vision, language=language)
    assert os.listdir(tmp_path) == ["checkpoint"]
    export_bundle(checkpoint, tmp_path / "bundle")


def test_fp16_overflow_is_per_part(checkpoint: Path) -> None:
    def enlarge(state: State) -> None:
        state[WQKV].reshape(-1)[0] = 70_000

    resave(checkpoint, enlarge)
    export_bundle(checkpoint, checkpoint.parent / "bundle", vision="fp16")


# Tokenizers.


def test_tokenizer_of_a_larger_checkpoint(tmp_path: Path) -> None:
    config = small_config()
    config["llm_config"]["vocab_size"] = 500
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
    message = refusal(checkpoint)
    assert "512 ids" in message
    assert "500 rows" in message
    assert "another checkpoint" in message


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<|im_end|>"])
def test_tokenizer_of_a_text_model(checkpoint: Path, token: str) -> None:
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        i: entry for i, entry in config["added_tokens_decoder"].items() if entry["content"] != token
    }
    path.write_text(json.dumps(config))
    assert f"no special token '{token}'" in refusal(checkpoint)


def test_missing_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").unlink()
    assert "tokenizer.model" in refusal(checkpoint)


@pytest.mark.parametrize("size", [0, 1, 3000])
def test_truncated_tokenizer(checkpoint: Path, size: int) -> None:
    os.truncate(checkpoint / "tokenizer.model", size)
    assert "tokenizer.model is not a SentencePiece model" in refusal(checkpoint)


@pytest.mark.parametrize(
    "entry", [3, "x", [], {}, {"content": None}, {"content": ""}], ids=lambda entry: repr(entry)
)
def test_malformed_added_token(checkpoint: Path, entry: object) -> None:
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"]["500"] = entry
    path.write_text(json.dumps(config))
    assert "added_tokens_decoder" in refusal(checkpoint)


@pytest.mark.parametrize("token_id", ["-1", "1.5", "many"])
def test_malformed_added_token_id(checkpoint: Path, token_id: str) -> None:
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"][token_id] = {"content": "<new>"}
    path.write_text(json.dumps(config))
    assert "added_tokens_decoder" in refusal(checkpoint)


def test_good_checkpoint_is_accepted(checkpoint: Path) -> None:
    """The checkpoints above fail for what was done to them."""
    assert set(load_file(checkpoint / WEIGHTS)) == set(random_state(small_config()))
    export_bundle(checkpoint, checkpoint.parent / "bundle")
