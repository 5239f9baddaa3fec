"""Tokenizers of every family against what transformers' classes made of the same files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from internvl_edge.bundle.text_stream import TextStream
from internvl_edge.bundle.tokenizer import Tokenizer, load_tokenizer
from internvl_edge.runtime import BundleError, PromptError

FAMILIES = Path(__file__).parents[1] / "families"
NAMES = sorted(path.parent.name for path in FAMILIES.glob("*/tokenizer_vectors.json"))
QWEN = FAMILIES / "orig_qwen2" / "model"
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> tuple[Tokenizer, list[dict[str, Any]]]:
    folder = FAMILIES / request.param
    vectors = json.loads((folder / "tokenizer_vectors.json").read_text("utf-8"))
    return load_tokenizer(folder / "model"), vectors


def test_encode_and_decode(tokenizer: tuple[Tokenizer, list[dict[str, Any]]]) -> None:
    loaded, vectors = tokenizer
    assert len(vectors) > 10
    for case in vectors:
        assert loaded.encode(case["text"]) == case["ids"], case
        assert loaded.decode(case["ids"]).strip() == case["decoded"].strip(), case


def test_streamed_text_is_the_decoded_text(
    tokenizer: tuple[Tokenizer, list[dict[str, Any]]],
) -> None:
    loaded, vectors = tokenizer
    for case in vectors:
        stream = TextStream(loaded)
        pieces = [stream.push(token) for token in case["ids"]]
        assert "".join(pieces) + stream.finish() == loaded.decode(case["ids"])


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 400), max_size=40))
def test_any_ids_stream_as_they_decode(ids: list[int]) -> None:
    """Broken UTF-8, special tokens and ids beyond the vocabulary included."""
    loaded = load_tokenizer(QWEN)
    stream = TextStream(loaded)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == loaded.decode(ids)


@pytest.fixture(scope="module")
def transformers_qwen() -> Any:
    return AutoTokenizer.from_pretrained(QWEN)


@settings(max_examples=300)
@given(text=TEXTS)
def test_qwen_ids_are_those_of_transformers(transformers_qwen: Any, text: str) -> None:
    """From vocab.json and merges.txt: composition, splitting, bytes as its own class has them."""
    assert load_tokenizer(QWEN).encode(text) == transformers_qwen(text)["input_ids"]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BundleError, match=r"pip install 'internvl-edge\[tokenizers\]'"):
        load_tokenizer(QWEN)


@pytest.mark.parametrize(
    ("bad", "said"),
    [("a\udc80", "not valid Unicode at character 1"), (b"a", "is b'a', it must be text")],
    ids=repr,
)
def test_what_is_no_text_is_refused(
    tokenizer: tuple[Tokenizer, list[dict[str, Any]]], bad: Any, said: str
) -> None:
    with pytest.raises(PromptError, match=said):
        tokenizer[0].encode(bad)


@pytest.mark.parametrize(
    ("file", "text", "refusal"),
    [
        ("merges.txt", "#version: 0.2\na b c\n", r"merges.txt: line 2 is 'a b c', expected a pair"),
        ("merges.txt", "#version: 0.2\nxx yy\n", r"vocab.json and merges.txt do not go together"),
        ("vocab.json", "[]", "cannot read .*vocab.json"),
        ("vocab.json", '{"a": "b"}', r"vocab.json and merges.txt do not go together"),
        ("vocab.json", '{"a": 0}', r"merges.txt do not go together"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, file: str, text: str, refusal: str) -> None:
    folder = Path(shutil.copytree(QWEN, tmp_path / "model"))
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=refusal):
        load_tokenizer(folder)


def test_added_tokens_that_do_not_follow_the_vocabulary(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(QWEN, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    decoder["900"] = decoder.pop("377")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"'</box>' is token 900, behind vocab.json it would be"):
        load_tokenizer(folder)
