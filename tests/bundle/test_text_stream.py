"""Text as the reference's tokenizer writes it, whole and streamed, added and control tokens too."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.bundle.added_tokens import AddedToken, read_added_tokens
from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.sentence_pieces import SentencePieceTokenizer
from internvl_edge.bundle.text_form import TextForm, clean_up
from internvl_edge.bundle.text_stream import CleanUp, TextStream
from internvl_edge.bundle.tokenizer import Tokenizer, load_tokenizer

VECTORS = json.loads((GOLDEN / "tokenizer_vectors.json").read_text(encoding="utf-8"))
PROTO = (GOLDEN / "model" / "tokenizer.model").read_bytes()
#: What the reference's slow tokenizer makes of its own ids.
REFERENCE = [
    ("Total : 5 . 00 , tax !", "Total : 5. 00, tax!"),
    ("it 's", "it's"),
    ("x . y", "x. y"),
    ("中文 , 测试", "中文, 测试"),
    ("plain. fine, ok", "plain. fine, ok"),
]
FORMS = [TextForm(skip, clean) for skip in (True, False) for clean in (True, False)]


def tokenizer(*more: AddedToken, **options: Any) -> Tokenizer:
    """The golden one with more tokens."""
    golden = load_tokenizer(GOLDEN / "model")
    return SentencePieceTokenizer(PROTO, [*golden.added.values(), *more], add_bos=True, **options)


def with_added() -> Tokenizer:
    return tokenizer(AddedToken("<loc_7>", 512, False), AddedToken("[SEG]", 513, False))


def streamed(tokens: Tokenizer, ids: list[int], form: TextForm) -> str:
    stream = TextStream(tokens, form)
    return "".join(map(stream.push, ids)) + stream.finish()


@pytest.mark.parametrize(("text", "wanted"), REFERENCE)
def test_blanks_are_the_references(text: str, wanted: str) -> None:
    tokens = load_tokenizer(GOLDEN / "model")
    ids = tokens.encode(text)
    assert tokens.decode(ids) == wanted
    assert streamed(tokens, ids, TextForm()) == wanted
    plain = TextForm(clean_up=False)
    assert tokens.decode(ids, plain) == streamed(tokens, ids, plain) == text
    others = tokenizer(cleans_up=False)
    assert others.decode(ids) == streamed(others, ids, TextForm()) == text


@pytest.mark.parametrize(
    ("config", "cleans"),
    [
        ({}, True),
        ({"tokenizer_class": "InternLM2Tokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": True}, True),
    ],
    ids=str,
)
def test_who_cleans_up(checkpoint: Path, config: dict[str, Any], cleans: bool) -> None:
    path = checkpoint / "tokenizer_config.json"
    told = json.loads(path.read_text())
    del told["tokenizer_class"], told["clean_up_tokenization_spaces"]
    path.write_text(json.dumps({**told, **config}))
    assert load_tokenizer(checkpoint).cleans_up == cleans


@settings(max_examples=500)
@given(
    text=st.text(alphabet=" .?!,'ntmsverx\n", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
def test_cleaned_in_pieces_is_cleaned_whole(text: str, cuts: list[int]) -> None:
    cleaner, shown = CleanUp(), ""
    for start, end in pairwise(sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})):
        shown += cleaner.push(text[start:end])
        assert clean_up(text).startswith(shown)
    assert shown + cleaner.finish() == clean_up(text)


def test_only_blanks_that_may_go_are_held_back() -> None:
    cleaner = CleanUp()
    given = ["Total", " :", " 5", " ", ". ", "never ", "n", "o", " '", "x"]
    told = [cleaner.push(piece) for piece in given]
    assert told == ["Total", " :", " 5", "", ".", " never", "", " no", "", " 'x"]


@pytest.mark.parametrize("case", VECTORS["encode"] + VECTORS["decode_random"], ids=str)
def test_control_tokens_are_shown_where_they_are_wanted(case: dict[str, Any]) -> None:
    tokens = load_tokenizer(GOLDEN / "model")
    shown = TextForm(skip_special_tokens=False)
    assert tokens.decode(case["ids"], shown) == case["decode_noskip"]
    got = streamed(tokens, case["ids"], shown)
    assert got.replace(" ", "") == case["decode_noskip"].replace(" ", "")


@settings(max_examples=300)
@given(ids=st.lists(st.integers(-1, 515), max_size=40), form=st.sampled_from(FORMS))
def test_streamed_text_is_the_decoded_text(ids: list[int], form: TextForm) -> None:
    """With control tokens, but for the blank before a text that leads to one."""
    tokens = with_added()
    got, wanted = streamed(tokens, ids, form), tokens.decode(ids, form)
    control = set(range(3)) | set(range(497, 503))
    if form.skip_special_tokens or not control & set(ids):
        assert got == wanted
    elif not form.clean_up:
        assert got.replace(" ", "") == wanted.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("at <loc_7> end", "at  <loc_7>  end"),
        ("It is [SEG].", "It is  [SEG] ."),
        ("<loc_7>", "<loc_7>"),
        ("<loc_7>[SEG]", "<loc_7> [SEG]"),
        ("at<|im_end|> <loc_7>", "at  <loc_7>"),
    ],
)
def test_added_tokens_are_text(text: str, wanted: str) -> None:
    """They stand apart, as the reference writes them."""
    tokens = with_added()
    ids = tokens.encode(text)
    assert {512, 513} & set(ids)
    assert tokens.decode(ids) == streamed(tokens, ids, TextForm()) == wanted


@pytest.mark.parametrize(
    ("flags", "text", "same_as"),
    [
        ({"lstrip": True}, "at  [SEG] end", "at[SEG] end"),
        ({"rstrip": True}, "at [SEG]  end", "at [SEG]end"),
        ({"lstrip": True, "rstrip": True}, " [SEG] ", "[SEG]"),
    ],
    ids=str,
)
def test_blanks_beside_an_added_token(flags: dict[str, bool], text: str, same_as: str) -> None:
    strict = tokenizer(AddedToken("[SEG]", 513, False, **flags))
    plain = tokenizer(AddedToken("[SEG]", 513, False))
    assert strict.encode(text) == plain.encode(same_as) != plain.encode(text)


@pytest.mark.parametrize(
    ("text", "token"), [("a SEG b", True), ("SEG", True), ("aSEG b", False), ("a SEGb", False)]
)
def test_a_single_word_is_a_token_alone(text: str, token: bool) -> None:
    words = tokenizer(AddedToken("SEG", 513, False, single_word=True))
    ids = words.encode(text)
    assert (513 in ids) == token
    if not token:
        assert ids == load_tokenizer(GOLDEN / "model").encode(text)


def test_what_is_special_is_read_from_either_file() -> None:
    entry = {"content": "[SEG]", "special": False, "rstrip": True}
    config = {"added_tokens_decoder": {"513": entry, "2": {"content": "</s>", "special": True}}}
    assert read_added_tokens(config, lambda name: {}) == [
        AddedToken("[SEG]", 513, False, rstrip=True),
        AddedToken("</s>", 2, True),
    ]
    files = {
        "added_tokens.json": {"[SEG]": 513, "</s>": 2, "<box>": 510},
        "special_tokens_map.json": {
            "eos_token": {"content": "</s>"},
            "additional_special_tokens": ["<box>"],
        },
    }
    found = read_added_tokens({}, lambda name: files[name])
    assert [(token.text, token.special) for token in found] == [
        ("[SEG]", False),
        ("</s>", True),
        ("<box>", True),
    ]
    alone = {"added_tokens.json": files["added_tokens.json"]}
    assert all(token.special for token in read_added_tokens({}, lambda name: alone.get(name, {})))


@pytest.mark.parametrize("entry", [{"special": 1}, {"lstrip": "no"}, {"content": ""}], ids=str)
def test_flags_are_true_or_false(entry: dict[str, Any]) -> None:
    config = {"added_tokens_decoder": {"513": {"content": "[SEG]", **entry}}}
    with pytest.raises(BundleError, match="added_tokens_decoder has a bad entry '513'"):
        read_added_tokens(config, lambda name: {})
