"""Prompts in segments: the reference's ids where no text spells a control token, and no forgery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.bundle.added_tokens import AddedToken
from internvl_edge.bundle.prompt import expand_images, get_template
from internvl_edge.bundle.segments import MARKUP, Segment
from internvl_edge.bundle.sentence_pieces import SentencePieceTokenizer
from internvl_edge.bundle.text_form import TextForm
from internvl_edge.bundle.tokenizer import Tokenizer, load_tokenizer

FAMILIES = Path(__file__).parents[1] / "families"
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
#: Of every kind: SentencePiece with its legacy and without, byte pairs of both kinds of files.
FAMILY_NAMES = ("orig_llama", "orig_llama3", "orig_phi3", "orig_qwen2", "hf_llama")
LOADED = {name: load_tokenizer(FAMILIES / name / "model") for name in FAMILY_NAMES}
LOADED["golden"] = load_tokenizer(GOLDEN / "model")
SPELLED = ["<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>", "</s>", "<|end|>"]
WORDS = st.lists(
    st.sampled_from([*SPELLED, "<|eot_id|>", "<ref>", "hello", " ", "\n", "<|im_", "end|>", "é你"])
)


@pytest.fixture(params=LOADED)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return LOADED[request.param]


def guarded(tokenizer: Tokenizer) -> set[int]:
    return {
        token.id for token in tokenizer.added.values() if token.special and token.text not in MARKUP
    }


def template_of(tokenizer: Tokenizer) -> str:
    return "phi3-chat" if "<|end|>" in tokenizer.added else "internvl2_5"


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["template"])
def test_golden_prompts_keep_their_ids(case: dict[str, Any]) -> None:
    loaded = LOADED["golden"]
    template = get_template(case["template"])
    turns = [(question, answer) for question, answer in case["messages"]]
    segments = template.segments(turns, case["system_message"])
    assert loaded.encode_segments(segments) == loaded.encode(case["prompt"])


@settings(max_examples=30)
@given(texts=st.lists(st.text(alphabet="a é你\n<>|[/'", max_size=12), min_size=4, max_size=4))
def test_texts_without_control_tokens_have_the_ids_of_the_whole(texts: list[str]) -> None:
    for loaded in LOADED.values():
        system, *said = texts
        question = expand_images(f"{said[0]}<image>{said[1]}", iter([3]))
        template = get_template(template_of(loaded))
        turns = [(question, said[2]), (said[0], None)]
        ids = loaded.encode_segments(template.segments(turns, system))
        assert ids == loaded.encode(template.render(turns, system))


@settings(max_examples=30)
@given(words=WORDS)
def test_no_text_becomes_a_control_token(words: list[str]) -> None:
    for loaded in LOADED.values():
        text = "x" + "".join(words)
        template = get_template(template_of(loaded))
        plain = loaded.encode_segments(template.segments([("x", "x")], "x"))
        forged = loaded.encode_segments(template.segments([(text, text)], text))
        control = guarded(loaded)
        assert [i for i in forged if i in control] == [i for i in plain if i in control]


@pytest.mark.parametrize("spelled", SPELLED)
def test_what_is_spelled_can_be_read(tokenizer: Tokenizer, spelled: str) -> None:
    text = f"Say {spelled} twice: {spelled}."
    ids = tokenizer.encode_segments([Segment(text, False)])
    shown = tokenizer.decode(ids, TextForm(skip_special_tokens=False, clean_up=False))
    assert shown.strip().removeprefix("<s>").removeprefix("<|begin_of_text|>").strip() == text


def test_beside_a_spelled_token_nothing_else_changes(tokenizer: Tokenizer) -> None:
    """Real tokens, and the text of other turns, are as without it."""
    template = get_template(template_of(tokenizer))
    end = template.stop
    whole = tokenizer.encode(template.render([("One", "Two"), ("Three", None)], None))
    turns = [("One", "Two"), (f"{end}Three", None)]
    got = tokenizer.encode_segments(template.segments(turns, None))
    split = len(tokenizer.encode(template.render([("One", "Two")], None)))
    assert got[:split] == whole[:split]
    assert got.count(tokenizer.token_id(end)) == whole.count(tokenizer.token_id(end))
    assert got[-2:] == whole[-2:]


def test_places_in_questions_stay_tokens() -> None:
    """They end no turn, and InternVL is asked about a place with them."""
    loaded = LOADED["golden"]
    text = "Where is <ref>the dog</ref>?"
    ids = loaded.encode_segments([Segment(text, False)])
    assert ids == loaded.encode(text)
    assert loaded.token_id("<ref>") in ids


def test_control_tokens_need_not_be_called_special() -> None:
    """Old files list special tokens elsewhere, and not all of them."""
    loaded = LOADED["golden"]
    assert isinstance(loaded, SentencePieceTokenizer)
    added = [AddedToken(token.text, token.id, special=False) for token in loaded.added.values()]
    again = SentencePieceTokenizer(loaded._proto, added, add_bos=True)
    for spelled in ("<|im_end|>", "<IMG_CONTEXT>"):
        ids = again.encode_segments([Segment(f"Say {spelled}.", False)])
        assert again.token_id(spelled) not in ids
    assert again.token_id("<box>") in again.encode_segments([Segment("<box>", False)])


@pytest.mark.parametrize("legacy", [True, False])
def test_pieces_of_the_model_that_are_control_tokens_by_another_name(legacy: bool) -> None:
    """InternLM2's `[UNUSED_TOKEN_146]` is the id of its `<|im_start|>`."""
    loaded = LOADED["golden"]
    assert isinstance(loaded, SentencePieceTokenizer)
    ids = loaded.encode("the total is wonderful")[1:]
    name, piece = max(
        ((loaded._pieces.IdToPiece(one), one) for one in ids), key=lambda it: len(it[0])
    )
    assert len(name) > 2
    added = [*loaded.added.values(), AddedToken("<|forged|>", piece)]
    again = SentencePieceTokenizer(loaded._proto, added, add_bos=True, legacy=legacy)
    text = name.replace("\u2581", " ").strip()
    said = f"say {text} and {text}"
    ids = again.encode_segments([Segment(said, False)])
    assert piece not in ids
    assert loaded.decode(ids).strip() == said
    assert again.encode(said) == SentencePieceTokenizer(
        loaded._proto, [*loaded.added.values()], add_bos=True, legacy=legacy
    ).encode(said)
