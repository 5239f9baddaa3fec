"""Random texts of many scripts through every tokenizer: a slice of `campaign.texts`."""

from __future__ import annotations

import json

import pytest
from campaign.texts import (
    DIGESTED,
    DIGESTS,
    FOLDERS,
    digest,
    is_slow,
    random_texts,
    streamed,
    tried,
)

from internvl_edge.bundle.byte_pairs import BytePairTokenizer
from internvl_edge.bundle.sentence_pieces import SentencePieceTokenizer
from internvl_edge.bundle.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_streamed_texts(name: str) -> None:
    found = tried(name, 150, None)
    assert (found.ids is None) == is_slow(FOLDERS[name])
    assert not found.ids
    assert not found.streams


@pytest.mark.parametrize(
    ("name", "pieces", "text"),
    [
        ("hf_llama", ["<0x04>", "<0xCA>"], "\ufffd\ufffd"),
        ("hf_llama", ["<0xC3>", "<0xA9>", "\u2581the"], "\u00e9 the"),
        ("orig_llama", ["<0x48>", "<|System|>", "\u2581w"], "H w"),
    ],
)
def test_texts_that_were_streamed_otherwise(name: str, pieces: list[str], text: str) -> None:
    """A row of bytes is read as one, or as none of it; a piece without a text hides no blank."""
    loaded = load_tokenizer(FOLDERS[name])
    if isinstance(loaded, SentencePieceTokenizer):
        ids = [loaded._pieces.PieceToId(piece) for piece in pieces]
    else:
        assert isinstance(loaded, BytePairTokenizer)
        ids = [loaded._model.token_to_id(piece) for piece in pieces]
    assert loaded.decode(ids) == text
    assert streamed(loaded, ids) == text


@pytest.mark.parametrize("name", [name for name in FOLDERS if is_slow(FOLDERS[name])])
def test_ids_of_the_slow_classes(name: str) -> None:
    """Recorded from transformers 4.37.2: `python -m campaign.texts --write --old PYTHON`."""
    loaded = load_tokenizer(FOLDERS[name])
    expected = json.loads(DIGESTS.read_text())["ids"][name]
    texts = random_texts(name, loaded, DIGESTED)
    found = [digest(loaded.encode(text)) for text in texts]
    wrong = [text for text, *pair in zip(texts, found, expected, strict=True) if len({*pair}) > 1]
    assert len(expected) == DIGESTED
    assert not wrong
