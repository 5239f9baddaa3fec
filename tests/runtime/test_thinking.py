"""Reasoning before an answer: asked for, told apart, and kept as the reference keeps it."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted import Scripted, scripted

from internvl_edge.bundle.prompt import THINKING_MESSAGE
from internvl_edge.cli.conversation import Asking, Conversation, as_dict
from internvl_edge.cli.history import History
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL, Reply, Sampling, UsageError
from internvl_edge.runtime.decoding.thinking import Piece, Thoughts, part_thoughts

FIXTURE = Path(__file__).parents[1] / "families" / "orig_qwen3"
QUESTION = "What is 12 + 30?"
REASONING, ANSWER = "12 + 30 is easy.", "It is 42."
WHOLE = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(FIXTURE / "model", tmp_path_factory.mktemp("thinking") / "bundle")


@pytest.fixture(scope="module")
def told(bundle: Path) -> tuple[InternVL, Scripted]:
    return scripted(bundle, reuse_bytes=0)


def test_the_prompt_is_the_references(told: tuple[InternVL, Scripted]) -> None:
    inputs = told[0].inputs
    system = inputs.system_message(None, thinking=True)
    with np.load(FIXTURE / "expected.npz") as data:
        expected = data["system_input_ids"].tolist()
    assert inputs.conversation([(QUESTION, None)], [], system) == expected
    assert inputs.system_message("Think.", thinking=True) == "Think."
    assert inputs.system_message(None, thinking=False) is None


def test_a_reply_has_reasoning_and_answer(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    backend.script = model.tokenizer.encode(WHOLE)
    reply = model.generate(QUESTION, thinking=True)
    assert (reply.thinking, reply.text, reply.whole) == (REASONING, ANSWER, WHOLE)
    assert reply.finish_reason == "stop"
    backend.script = model.tokenizer.encode(WHOLE)
    plain = model.generate(QUESTION)
    assert (plain.thinking, plain.text, plain.whole) == ("", WHOLE, WHOLE)


def test_pieces_say_which_they_are(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    backend.script = model.tokenizer.encode(WHOLE)
    pieces = list(model.stream(QUESTION, thinking=True))
    said = ["".join(piece for piece in pieces if piece.thinking is kind) for kind in (True, False)]
    assert said == [f"{REASONING}\n", ANSWER]
    kinds = [piece.thinking for piece in pieces]
    assert kinds == sorted(kinds, reverse=True)
    backend.script = model.tokenizer.encode(WHOLE)
    assert not any(piece.thinking for piece in model.stream(QUESTION))


def test_asyncio_and_batches(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told

    async def ask() -> tuple[list[Piece], Reply]:
        stream = model.astream(QUESTION, thinking=True)
        return [piece async for piece in stream], await stream.finish()

    backend.script = model.tokenizer.encode(WHOLE)
    pieces, reply = asyncio.run(ask())
    assert (reply.thinking, reply.text) == (REASONING, ANSWER)
    assert "".join(piece for piece in pieces if piece.thinking) == f"{REASONING}\n"
    assert "".join(piece for piece in pieces if not piece.thinking) == ANSWER
    backend.script = model.tokenizer.encode(WHOLE)
    (one,) = model.generate_batch([QUESTION], thinking=True)
    assert (one.thinking, one.text) == (REASONING, ANSWER)


def test_without_its_end_all_is_reasoning(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    backend.script = model.tokenizer.encode(WHOLE)
    reply = model.generate(QUESTION, thinking=True, max_new_tokens=6)
    assert reply.finish_reason == "length"
    assert reply.text == ""
    assert reply.thinking
    assert REASONING.startswith(reply.thinking)


def test_a_stream_that_is_closed_within_its_reasoning(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    backend.script = model.tokenizer.encode(WHOLE)
    stream = model.stream(QUESTION, thinking=True)
    seen = "".join([next(stream), next(stream)])
    reply = stream.close()
    assert (reply.text, reply.thinking) == ("", seen.strip())
    backend.script = []


@pytest.mark.parametrize(("keep", "kept"), [(True, WHOLE), (False, ANSWER)])
def test_later_turns_see_what_the_history_keeps(
    told: tuple[InternVL, Scripted], keep: bool, kept: str
) -> None:
    """The reference keeps reasoning: its marks are tokens again, and positions are reused."""
    model, backend = told
    chat = model.chat(system_message="Think.", thinking=True, keep_thinking=keep)
    backend.script = model.tokenizer.encode(WHOLE)
    chat.send(QUESTION)
    assert chat.history == [(QUESTION, kept)]
    prompt, answer = chat._cache.state.length, len(model.tokenizer.encode(WHOLE))
    second = chat.send("Sure?", max_new_tokens=1)
    # All but the stop token, which was never run; or all before the answer.
    assert second.timings.cached_tokens == (prompt if keep else prompt - answer)
    template = f"<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
    template += f"<|im_start|>assistant\n{kept}<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    expected = model.tokenizer.encode(f"{template}<|im_start|>assistant\n")
    assert second.timings.prompt_tokens == len(expected)


def test_a_saved_conversation_goes_on(told: tuple[InternVL, Scripted], tmp_path: Path) -> None:
    model, backend = told
    chat = model.chat(thinking=True)
    backend.script = model.tokenizer.encode(WHOLE)
    chat.send(QUESTION, max_new_tokens=64)
    chat.save(tmp_path / "talk.json")
    system, *_ = json.loads((tmp_path / "talk.json").read_text())
    assert system == {"role": "system", "content": THINKING_MESSAGE}
    again = model.chat(messages=tmp_path / "talk.json", thinking=True)
    assert again.history == chat.history == [(QUESTION, WHOLE)]


def test_models_that_do_not_think(golden_model: InternVL) -> None:
    with pytest.raises(UsageError, match="thinking needs the token </think>"):
        golden_model.generate(QUESTION, thinking=True)
    with pytest.raises(UsageError, match="thinking needs the token </think>"):
        golden_model.chat(thinking=True)


def test_the_terminal_shows_reasoning_beside_the_answer(
    told: tuple[InternVL, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output has the answer alone."""
    model, backend = told
    asking = Asking(64, Sampling(), (), None, upright=False, json=False)
    chat = model.chat(system_message="Think.", thinking=True)
    backend.script = model.tokenizer.encode(WHOLE)
    Conversation(model.chat, chat, asking, lambda picture: 1, History(None)).ask(QUESTION)
    out, err = capsys.readouterr()
    assert out == f"{ANSWER}\n"
    assert err.startswith(f"{REASONING}\n")
    backend.script = model.tokenizer.encode(WHOLE)
    assert as_dict(model.generate(QUESTION, thinking=True))["thinking"] == REASONING


def test_the_option_of_the_command(
    bundle: Path, golden_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--thinking", "--json", "-p", QUESTION, "--max-new-tokens", "3", "--device", "cpu"]
    assert main(["chat", str(bundle), *asked]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert (reply["text"], reply["finish_reason"]) == ("", "length")
    assert reply["timings"]["prompt_tokens"] > 390
    assert main(["chat", str(golden_bundle), *asked]) == 2
    assert "--thinking needs the token </think>, which InternVL 3.5 has" in capsys.readouterr().err


@example("<think>", [])
@example(" \n<think>\n a</think>\n\n b </think> c", [3, 9, 15])
@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<thin", "k>", "</", " ", "\n", "a", "<"])
    ).map("".join),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_pieces_are_the_parts_of_the_whole(text: str, cuts: list[int]) -> None:
    """However the text is cut, and by a regular expression instead."""
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    thoughts = Thoughts()
    found = [thoughts.push(text[start:end]) for start, end in pairwise(bounds)]
    reasoning = "".join(thought for thought, _ in found) + thoughts.finish()
    answer = "".join(piece for _, piece in found)
    parts = re.fullmatch(r"\s*(?:<think>)?(.*?)(?:</think>(.*))?", text, re.DOTALL)
    assert parts is not None
    expected = parts[1].strip(), (parts[2] or "").strip()
    assert (reasoning.strip(), answer.strip()) == expected == part_thoughts(text)
    assert not reasoning[:1].isspace()
    assert not answer[:1].isspace()
