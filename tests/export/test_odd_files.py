"""Inputs of export that are no files, have no end, or lie beside others: refused at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import GOLDEN, small_config, write_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

from internvl_edge.bundle.quoting import LONGEST
from internvl_edge.bundle.tokenizer import load_tokenizer
from internvl_edge.calib_data.items import CalibrationDataError, load_items
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.names import HEAD
from internvl_edge.runtime import BundleError, CheckpointError, ImageError

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", small_config(), shards=3)


def refusal(checkpoint: Path) -> str:
    before = sorted(os.listdir(checkpoint.parent))
    with pytest.raises(CheckpointError) as caught:
        export_bundle(checkpoint, checkpoint.parent / "bundle")
    assert sorted(os.listdir(checkpoint.parent)) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def replaced(path: Path, by: str) -> None:
    path.unlink(missing_ok=True)
    if by == "pipe":
        os.mkfifo(path)
    elif by == "device":
        path.symlink_to("/dev/zero")
    elif by == "directory":
        path.mkdir()
    else:
        path.symlink_to(path)  # a circle


@pytest.mark.parametrize("by", ["pipe", "device", "directory", "circle"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
)
def test_no_file(checkpoint: Path, name: str, by: str) -> None:
    replaced(checkpoint / name, by)
    message = refusal(checkpoint)
    if (name, by) != ("model.safetensors", "circle"):  # such a link is as good as none
        assert name in message


@pytest.mark.parametrize("by", ["pipe", "device", "directory"])
@pytest.mark.parametrize("name", [INDEX, SHARD])
def test_no_file_of_a_sharded_checkpoint(sharded: Path, name: str, by: str) -> None:
    replaced(sharded / name, by)
    assert name in refusal(sharded)


@pytest.mark.parametrize("by", ["pipe", "device", "directory"])
def test_no_file_of_added_tokens(checkpoint: Path, by: str) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    replaced(checkpoint / "added_tokens.json", by)
    assert "added_tokens.json" in refusal(checkpoint)


@pytest.mark.parametrize("by", ["pipe", "device"])
def test_no_file_of_what_is_only_copied(checkpoint: Path, by: str) -> None:
    replaced(checkpoint / "special_tokens_map.json", by)
    assert "special_tokens_map.json: it is a " in refusal(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"],
)
def test_forty_gigabytes(checkpoint: Path, name: str) -> None:
    with (checkpoint / name).open("ab") as stream:
        stream.truncate(40 << 30)  # sparse
    message = refusal(checkpoint)
    assert name in message
    assert f"it has {40 << 30} bytes, at most {64 << 20} are read" in message


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": 1e999}', "beyond double precision"),
        (b'{"a":' * 5000, "within one another"),
        (b'"' + b"x" * 100_000 + b'"', "expected a JSON object"),
    ],
    ids=["NaN", "twice", "surrogate", "1e999", "deep", "text"],
)
def test_json_that_is_none(checkpoint: Path, name: str, content: bytes, said: str) -> None:
    (checkpoint / name).write_bytes(content)
    message = refusal(checkpoint)
    assert name in message
    assert said in message
    assert len(message) < 3 * LONGEST + len(str(checkpoint))


def test_byte_order_mark(checkpoint: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + content)
    Checkpoint(checkpoint)
    export_bundle(checkpoint, checkpoint.parent / "bundle")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"<img>": -1}, "'<img>': -1"),
        ({"<img>": "500"}, "'<img>': '500'"),
        ({"<img>": True}, "'<img>': True"),
        ({"": 500}, "'': 500"),
        ({"x" * 10_000: None}, "'xxx"),
    ],
    ids=str,
)
def test_added_tokens_that_are_none(
    checkpoint: Path, content: dict[str, object], said: str
) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "added_tokens.json").write_text(json.dumps(content))
    message = refusal(checkpoint)
    assert f"added_tokens.json has a bad entry {said}" in message
    assert len(message) < 3 * LONGEST


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("add_bos_token", "false", "add_bos_token is 'false', expected true or false"),
        ("add_bos_token", 0, "add_bos_token is 0, expected true or false"),
        ("add_eos_token", True, "add_eos_token is true; supported: false"),
    ],
)
def test_tokenizer_flags(checkpoint: Path, key: str, value: object, said: str) -> None:
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {key: value}
    path.write_text(json.dumps(config))
    assert said in refusal(checkpoint)


@pytest.mark.parametrize("bit", [0x80, 0x01])
def test_damaged_pieces_are_refused_or_decode(tmp_path: Path, bit: int) -> None:
    """SentencePiece takes any bytes, and quotes them in what it says: neither need be UTF-8."""
    for name in ("tokenizer_config.json", "added_tokens.json"):
        shutil.copyfile(GOLDEN / "model" / name, tmp_path / name)
    whole = (GOLDEN / "model" / "tokenizer.model").read_bytes()
    refusals = set()
    for at in range(0, len(whole), 29):
        damaged = bytearray(whole)
        damaged[at] ^= bit
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            tokenizer = load_tokenizer(tmp_path)
        except BundleError as error:
            refusals.add(str(error).split(":")[0])
        else:
            for token in range(tokenizer.size):
                tokenizer.decode([token])
    assert refusals == {"tokenizer.model is not a SentencePiece model"}


# Weights told twice.


def test_a_stale_index_beside_a_newer_file(sharded: Path) -> None:
    """transformers reads the single file then; the shards are an earlier save's."""
    state = {}
    for shard in sorted(sharded.glob("*.safetensors")):
        state |= load_file(shard)
    save_file(state, sharded / "model.safetensors")
    message = refusal(sharded)
    assert "model.safetensors and model.safetensors.index.json" in message
    assert "model-0000" in message
    (sharded / INDEX).unlink()
    export_bundle(sharded, sharded.parent / "bundle")


def test_an_index_of_the_single_file(checkpoint: Path) -> None:
    names = load_file(checkpoint / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (checkpoint / INDEX).write_text(json.dumps(index))
    export_bundle(checkpoint, checkpoint.parent / "bundle")


def test_a_shard_replaced_while_it_is_read(checkpoint: Path) -> None:
    source = Checkpoint(checkpoint)
    name = HEAD
    assert len(list(source.blocks(name))) == 1
    shutil.copyfile(checkpoint / "model.safetensors", checkpoint / "copy")
    (checkpoint / "copy").replace(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors was replaced or changed"):
        list(source.blocks(name))


def test_long_names_of_tensors(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["lora_free\n" + "x" * 100_000] = state["mlp1.0.bias"]
    save_file(state, path)
    assert len(refusal(checkpoint)) < 2 * LONGEST


# Calibration data.


@pytest.mark.parametrize("by", ["pipe", "device"])
def test_calibration_that_is_no_file(tmp_path: Path, by: str) -> None:
    replaced(tmp_path / "data.jsonl", by)
    for source in (tmp_path, tmp_path / "data.jsonl"):
        with pytest.raises(CalibrationDataError, match=r"data.jsonl: it is a .*, not a regular"):
            load_items(source)


@pytest.mark.parametrize("by", ["pipe", "device", "directory"])
def test_pictures_of_calibration_that_are_no_files(tmp_path: Path, by: str) -> None:
    replaced(tmp_path / "a.png", by)
    with pytest.raises(ImageError, match=r"cannot read image .*a.png"):
        load_items(tmp_path)
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(CalibrationDataError, match=r"list.jsonl:1: cannot read image"):
        load_items(tmp_path)


@pytest.mark.parametrize(
    "line",
    [b"[" * 5000, b'{"image": NaN}', b'{"image": "a", "image": "b"}', b'{"image": "\\ud800"}'],
    ids=["deep", "NaN", "twice", "surrogate"],
)
def test_lines_of_calibration_that_are_no_json(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(line + b"\n")
    with pytest.raises(CalibrationDataError, match=r"data.jsonl:1: expected an object"):
        load_items(tmp_path)


def test_a_line_separator_inside_a_question(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entry = {"image": "a.png", "prompt": "one\u2028two"}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")
    assert load_items(tmp_path)[0].prompt == "one\u2028two"
