"""bundle.json: sealed, consistent, and the list of all that is used."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bundle.contract import EMBEDDING_SCALES, EMBEDDING_TABLE, MANIFEST
from internvl_edge.bundle.json_reader import JsonError, as_object, parse_json
from internvl_edge.bundle.manifest import (
    Manifest,
    file_entry,
    open_bundle,
    parse_manifest,
    read_manifest,
)
from internvl_edge.bundle.seal import SEAL, check_seal, sealed
from internvl_edge.bundle.tokenizer import load_tokenizer
from internvl_edge.runtime import BundleError, InternVL
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.inspection import inspect_bundle


@pytest.fixture
def content(golden_bundle: Path) -> dict[str, Any]:
    """Of the golden bundle's manifest."""
    return dict(json.loads((golden_bundle / MANIFEST).read_text(encoding="utf-8")))


def rewritten(bundle: Path, change: dict[str, Any]) -> None:
    """Change values of bundle.json, by their paths with slashes, and seal it again."""
    content = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    for path, value in change.items():
        *steps, last = path.split("/")
        place = content
        for step in steps:
            place = place[step]
        place[last] = value
    (bundle / MANIFEST).write_text(json.dumps(sealed(content)))


# The seal.


def parsed(text: bytes) -> Manifest | None:
    """What the text says; None where it is refused."""
    try:
        return parse_manifest(as_object(parse_json(text)))
    except (BundleError, JsonError):
        return None


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_refused_or_harmless(golden_bundle: Path, bit: int) -> None:
    text = (golden_bundle / MANIFEST).read_bytes()
    whole = parsed(text)
    assert whole is not None
    for at in range(len(text)):
        flipped = bytearray(text)
        flipped[at] ^= 1 << bit
        assert parsed(bytes(flipped)) in (None, whole), at


@given(data=st.data())
def test_any_damage_is_refused_or_harmless(golden_bundle: Path, data: st.DataObject) -> None:
    text = (golden_bundle / MANIFEST).read_bytes()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    damaged = text[:start] + data.draw(st.binary(max_size=8)) + text[stop:]
    assert parsed(damaged) in (None, parsed(text))


def test_the_layout_is_not_sealed(bundle: Path, content: dict[str, Any]) -> None:
    backwards = dict(reversed(content.items()))
    (bundle / MANIFEST).write_text(json.dumps(backwards, indent=None))
    assert read_manifest(bundle) == parse_manifest(content)


@pytest.mark.parametrize("seal", ["", "0" * 64, None, 1, [], True])
def test_another_seal(content: dict[str, Any], seal: object) -> None:
    with pytest.raises(BundleError, match="its seal does not fit its content"):
        parse_manifest({**content, SEAL: seal})


def test_a_bundle_from_before_there_were_seals(bundle: Path, content: dict[str, Any]) -> None:
    del content[SEAL]
    (bundle / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(bundle) == parse_manifest(sealed(content))
    InternVL.load(bundle, device="cpu", threads=1).generate("hi", max_new_tokens=1)


def test_a_seal_whose_name_is_damaged(content: dict[str, Any]) -> None:
    content["sdal"] = content.pop(SEAL)
    with pytest.raises(BundleError, match="it has no seal, but the key 'sdal' that needs one"):
        parse_manifest(content)


def test_a_later_key_is_let_through_where_it_is_sealed(content: dict[str, Any]) -> None:
    assert parse_manifest(sealed({**content, "later": {"x": 1}})) == parse_manifest(content)


def test_the_seal_is_of_the_content_without_it(content: dict[str, Any]) -> None:
    assert sealed(content) == content
    assert sealed({k: v for k, v in content.items() if k != SEAL}) == content
    check_seal(content, older=())


def test_damage_is_said_where_it_is(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"max_tiles": 12', '"max_tiles": 13'))
    with pytest.raises(BundleError, match=r"bundle.json is damaged: it was altered.*export it"):
        open_bundle(bundle)


# Digests.


def test_a_damaged_digest_is_told_from_a_damaged_file(
    bundle: Path, content: dict[str, Any]
) -> None:
    """The last digit: the first twelve are equal, and the file is as it was."""
    digest = content["files"]["vision.data"]["sha256"]
    other = "0" if digest[-1] != "0" else "1"
    rewritten(bundle, {"files/vision.data/sha256": digest[:-1] + other})
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert "the sha256 that is listed for" in message
    assert "1 of its 64 digits differ" in message
    assert f"...{other}... instead of ...{digest[-1]}..." in message
    assert "was altered" not in message


def test_digests_that_begin_alike_are_shown_where_they_differ(
    bundle: Path, content: dict[str, Any]
) -> None:
    digest = content["files"]["vision.data"]["sha256"]
    mirrored = digest[:20] + "".join("%x" % (15 - int(digit, 16)) for digit in digest[20:])
    rewritten(bundle, {"files/vision.data/sha256": mirrored})
    with pytest.raises(BundleError, match="was altered") as caught:
        open_bundle(bundle)
    assert f"...{digest[20:32]}..." in str(caught.value)
    assert f"...{mirrored[20:32]}..." in str(caught.value)


# Values beside each other.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spec/tiling/min_tiles": 13}, "expected at most 12"),
        ({"spec/tiling/max_tiles": 1025}, "at most 1024"),
        ({"spec/vision/tile_size": 57}, "57 is not a multiple of 28"),
        ({"spec/vision/tile_size": 56_000}, "56000, at most 2048"),
        ({"spec/vision/image_size": 56_000}, "56000, at most 2048"),
        ({"spec/vision/image_size": 13}, "image_size 13 < patch_size 14"),
        ({"spec/vision/num_attention_heads": 3}, "64 is not a multiple of 3"),
        ({"spec/vision/num_hidden_layers": 10**6}, "at most 1024"),
        ({"spec/vision/select_layer": -5}, "the tower has 3 layers"),
        ({"spec/language/num_attention_heads": 5}, "96 is not a multiple of 5"),
        ({"spec/language/num_key_value_heads": 4}, "6 is not a multiple of 4"),
        ({"spec/language/num_hidden_layers": 10**6}, "at most 1024"),
        ({"spec/language/rope_factor": 0.5}, "factor is 0.5, expected 1 or more"),
        ({"spec/language/rope_type": "default"}, "factor is 3, expected 1 with the type default"),
        ({"spec/language/max_position_embeddings": 2**31 - 1}, "the context is 6.44245e+09"),
        ({"spec/language/max_position_embeddings": 1}, "4 positions of the decoder, the context"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_that_contradict_each_other(bundle: Path, change: dict[str, Any], said: str) -> None:
    rewritten(bundle, change)
    for reading in (read_manifest, inspect_bundle, InternVL.load):
        with pytest.raises(BundleError) as caught:
            reading(bundle)
        assert said in str(caught.value)
        assert "export" in str(caught.value)


# Listed files only.


@pytest.fixture
def quantised(bundle: Path) -> Path:
    """The golden bundle with an int8 table of its shape; its graphs are what they were."""
    spec = read_manifest(bundle).spec.language
    np.save(bundle / EMBEDDING_TABLE, np.ones((spec.vocab_size, spec.hidden_size), np.int8))
    np.save(bundle / EMBEDDING_SCALES, np.full((spec.vocab_size, 1), 0.5, np.float32))
    relist(bundle)
    return bundle


def relist(bundle: Path, *, scales: bool = True) -> None:
    """List the table, and the scales, as they are; the precision is int8."""
    content = json.loads((bundle / MANIFEST).read_text())
    files = content["files"]
    for name in (EMBEDDING_TABLE, EMBEDDING_SCALES)[: 1 + scales]:
        files[name] = vars(file_entry(bundle / name))
    content["precision"]["embedding"] = "int8"
    (bundle / MANIFEST).write_text(json.dumps(sealed(content)))


def test_int8_table(quantised: Path) -> None:
    rows = EmbeddingTable.load(open_bundle(quantised)).rows(np.array([0, 511]))
    assert rows.shape == (2, 96)
    assert (rows == 0.5).all()


def test_scales_that_are_not_listed(bundle: Path) -> None:
    """They lie there: of another export, perhaps."""
    spec = read_manifest(bundle).spec.language
    np.save(bundle / EMBEDDING_TABLE, np.ones((spec.vocab_size, spec.hidden_size), np.int8))
    np.save(bundle / EMBEDDING_SCALES, np.full((spec.vocab_size, 1), 0.5, np.float32))
    relist(bundle, scales=False)
    with pytest.raises(BundleError, match=r"does not list embedding.scales.npy"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((512, 2), np.float32),
        ((512, 96), np.float32),
        ((512,), np.float32),
        ((511, 1), np.float32),
        ((1, 512), np.float32),
        ((512, 1), np.float64),
        ((512, 1), np.float16),
        ((512, 1), np.dtype(">f4")),
    ],
    ids=str,
)
def test_scales_of_another_shape(quantised: Path, shape: tuple[int, ...], dtype: Any) -> None:
    np.save(quantised / EMBEDDING_SCALES, np.ones(shape, dtype))
    relist(quantised)
    with pytest.raises(BundleError, match=r"expected float32 \(512, 1\)"):
        EmbeddingTable.load(open_bundle(quantised))


def test_a_table_stored_by_columns(quantised: Path) -> None:
    np.save(quantised / EMBEDDING_TABLE, np.asfortranarray(np.ones((512, 96), np.int8)))
    relist(quantised)
    with pytest.raises(BundleError, match="row by row"):
        EmbeddingTable.load(open_bundle(quantised))


def test_a_table_with_something_behind_it(quantised: Path) -> None:
    with (quantised / EMBEDDING_TABLE).open("ab") as stream:
        stream.write(b"x" * 96)
    relist(quantised)
    with pytest.raises(BundleError, match="and nothing else"):
        EmbeddingTable.load(open_bundle(quantised))


def test_tokenizer_files_that_are_not_listed_are_not_read(bundle: Path) -> None:
    before = load_tokenizer(bundle)
    (bundle / "added_tokens.json").write_text(
        json.dumps({token.text: token.id for token in before.added.values()})
    )
    content = json.loads((bundle / MANIFEST).read_text())
    del content["files"]["tokenizer_config.json"]  # added_tokens.json then names the tokens
    content["files"]["added_tokens.json"] = vars(file_entry(bundle / "added_tokens.json"))
    (bundle / MANIFEST).write_text(json.dumps(sealed(content)))
    (bundle / "tokenizer_config.json").write_text('{"add_bos_token": false, "junk": 1}')
    tokenizer = InternVL.load(bundle, device="cpu", threads=1).tokenizer
    assert tokenizer.encode("hello<img>") == before.encode("hello<img>")
    assert load_tokenizer(bundle).encode("hello")[0] != before.encode("hello")[0]


def test_a_tokenizer_that_is_not_listed(bundle: Path, content: dict[str, Any]) -> None:
    del content["files"]["tokenizer.model"]
    (bundle / MANIFEST).write_text(json.dumps(sealed(content)))
    with pytest.raises(BundleError, match=r"lists no tokenizer.model"):
        InternVL.load(bundle, device="cpu", threads=1)


def test_a_report_that_is_not_listed_is_not_read(bundle: Path) -> None:
    before = inspect_bundle(bundle)
    (bundle / "quantisation.json").write_text("not JSON")
    after = inspect_bundle(bundle)
    assert before.pop("memory").keys() == after.pop("memory").keys()  # what is free changes
    assert after == before


def test_a_manifest_does_not_list_itself(bundle: Path, content: dict[str, Any]) -> None:
    content = copy.deepcopy(content)
    content["files"][MANIFEST] = content["files"]["vision.data"]
    with pytest.raises(BundleError, match="names a file outside"):
        parse_manifest(sealed(content))


# Files that are none.


@pytest.mark.parametrize("verify", ["hash", "size"])
@pytest.mark.parametrize(
    "name", [MANIFEST, "vision.onnx", "language.data", "embedding.npy", "tokenizer.model"]
)
def test_a_pipe_instead_of_a_file(bundle: Path, name: str, verify: Any) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(BundleError, match=f"{name}: it is a named pipe, not a regular file"):
        InternVL.load(bundle, device="cpu", threads=1, verify=verify)


def test_a_name_that_is_not_utf8(bundle: Path) -> None:
    path = Path(os.fsdecode(bytes(bundle.parent) + b"/\xff"))
    shutil.move(bundle, path)
    assert inspect_bundle(path)["kind"] == "bundle"
    with pytest.raises(BundleError, match="is not UTF-8, and ONNX Runtime takes no other path"):
        InternVL.load(path, device="cpu", threads=1)
