"""Prompts and settings out of range: one clear error at once, and a conversation as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.runtime import (
    DeviceError,
    ImageError,
    InternVL,
    InternVLEdgeError,
    LimitError,
    PromptError,
    Sampling,
)
from internvl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from internvl_edge.runtime.chat import Chat

Ask = Callable[..., object]
Setting = dict[str, Any]

SQUARE = Image.new("RGB", (56, 56), (200, 30, 30))
#: Some forty tokens of the golden tokenizer.
SENTENCE = "What is written on the sign that stands behind the red car? "


@pytest.fixture(params=["generate", "stream", "chat", "chat, second turn"])
def ask(request: pytest.FixtureRequest, golden_model: InternVL) -> Ask:
    """Every way to send a prompt."""
    if request.param in ("generate", "stream"):
        return getattr(golden_model, request.param)  # type: ignore[no-any-return]
    chat = golden_model.chat()
    if request.param != "chat":
        chat.send("Hello!", max_new_tokens=3)
    return chat.stream


def refusal(error: type[InternVLEdgeError], ask: Ask, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        ask(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Prompts.


@pytest.mark.parametrize("images", [[], [SQUARE]], ids=["text", "image"])
@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\u3000"], ids=ascii)
def test_empty_prompt(ask: Ask, prompt: str, images: list[Image.Image]) -> None:
    assert "the prompt is empty; ask something" in refusal(PromptError, ask, prompt, images)


@pytest.mark.parametrize(
    ("prompt", "images"), [("<image> and <image>", 1), ("<image>", 2), ("<image>", 0)]
)
def test_wrong_number_of_image_places(ask: Ask, prompt: str, images: int) -> None:
    message = refusal(PromptError, ask, prompt, [SQUARE] * images)
    assert f"has {prompt.count('<image>')} <image> for {images} images" in message


@pytest.mark.parametrize("images", [[], [SQUARE]], ids=["text", "image"])
@pytest.mark.parametrize("prompt", ["<IMG_CONTEXT>", "What does <IMG_CONTEXT> mean?"])
def test_stray_context_token(
    golden_model: InternVL, prompt: str, images: list[Image.Image]
) -> None:
    """Refused where the caller asks for control tokens in texts; else it is text."""
    message = refusal(
        PromptError, lambda: golden_model.generate(prompt, images, control_tokens=True)
    )
    rows = 4 * len(images)  # 4 x 4 patches of 14 pixels, shuffled by 2 x 2
    assert f"the prompt has {rows + 1} <IMG_CONTEXT> tokens for {rows} image rows" in message
    assert "remove <IMG_CONTEXT>" in message
    golden_model.generate(prompt, images, max_new_tokens=1)


@pytest.mark.parametrize("way", ["generate", "chat"])
def test_stray_context_token_in_the_system_message(golden_model: InternVL, way: str) -> None:
    told: dict[str, Any] = {"system_message": "You are <IMG_CONTEXT>.", "control_tokens": True}
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: golden_model.generate("Hello!", **told),
        "chat": lambda: golden_model.chat(**told).send("Hello!"),
    }
    assert "1 <IMG_CONTEXT> tokens for 0 image rows" in refusal(PromptError, calls[way])


@pytest.mark.parametrize("prompt", ["caf\udce9?", "\ud83d half an emoji"], ids=ascii)
def test_text_that_is_not_unicode(ask: Ask, prompt: str) -> None:
    """What Python makes of another encoding's bytes on the command line."""
    assert "not valid Unicode" in refusal(PromptError, ask, prompt)


@pytest.mark.parametrize("prompt", ["a\0b", "\u202e right to left", "😀", "<s></s><unk>"])
def test_odd_text_is_answered(golden_model: InternVL, prompt: str) -> None:
    assert golden_model.generate(prompt, max_new_tokens=1).token_ids


def test_other_special_tokens_stay_live(golden_model: InternVL) -> None:
    """As in the reference: only the number of image slots is checked."""
    golden_model.generate("<img></img><|im_end|><box>", max_new_tokens=1)


# The context.


def test_prompt_beyond_the_context(ask: Ask) -> None:
    message = refusal(LimitError, ask, SENTENCE * 100)
    assert "the context holds 1536" in message
    assert "or give less text (the model takes no more than 1536)" in message


def test_prompt_beyond_a_context_that_could_be_larger(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, max_context=300)
    with pytest.raises(LimitError, match=r"the context holds 300; .*, or raise max_context"):
        model.generate(SENTENCE * 100)


def test_images_beyond_the_context(ask: Ask) -> None:
    wide = Image.new("RGB", (56 * 12, 56))
    assert "the context holds" in refusal(LimitError, ask, "What?", [wide] * 30)


@pytest.mark.parametrize("beyond", [0, 1])
def test_prompt_at_the_end_of_the_context(golden_model: InternVL, beyond: int) -> None:
    ids = [5] * (golden_model.max_context + beyond)
    if beyond:
        refusal(LimitError, golden_model.generate, ids)
        return
    reply = golden_model.generate(ids, max_new_tokens=8)
    assert (len(reply.token_ids), reply.finish_reason) in ((1, "length"), (1, "stop"))


def test_answer_ends_with_the_context(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, max_context=20)
    reply = model.generate([1, 5, 6, 7], max_new_tokens=1000)
    assert len(reply.token_ids) <= 17
    assert reply.finish_reason in ("length", "stop")


def test_conversation_beyond_the_context(golden_model: InternVL) -> None:
    """The turn that no longer fits is refused; a shorter one in its place is answered."""
    chat = golden_model.chat()
    chat.send(SENTENCE * 18, max_new_tokens=4)
    chat.send(SENTENCE * 9, max_new_tokens=4)
    before = snapshot(chat)
    refusal(LimitError, chat.send, SENTENCE * 18)
    assert snapshot(chat) == before
    chat.send("Short?", max_new_tokens=4)
    assert len(chat.history) == 3


# Token ids.


@pytest.mark.parametrize("ids", [[], (), np.empty(0, np.int64)], ids=["list", "tuple", "array"])
def test_no_token_ids(golden_model: InternVL, ids: Any) -> None:
    assert refusal(PromptError, golden_model.generate, ids) == "the prompt has no tokens"
    assert refusal(PromptError, golden_model.logits, ids) == "the prompt has no tokens"


@pytest.mark.parametrize("token", [-1, 512, 2**31, 2**70, -(2**70)])
def test_token_ids_out_of_range(golden_model: InternVL, token: int) -> None:
    for call in (golden_model.generate, golden_model.logits):
        assert "must be in 0..511" in refusal(PromptError, call, [1, token])


@pytest.mark.parametrize("rows", [3, 5])
def test_context_ids_that_are_not_the_image_rows(golden_model: InternVL, rows: int) -> None:
    ids = [1] + [golden_model.context_id] * rows
    for call in (golden_model.generate, golden_model.logits):
        message = refusal(PromptError, call, ids, [SQUARE])
        assert f"{rows} <IMG_CONTEXT> tokens for 4 image rows" in message


# Settings.


@pytest.mark.parametrize("count", [0, -1])
def test_max_new_tokens(ask: Ask, count: int) -> None:
    message = refusal(LimitError, ask, "Hello!", max_new_tokens=count)
    assert message == f"max_new_tokens is {count}, it must be at least 1"


@pytest.mark.parametrize("count", [0, -1, 1025, 10**9])
@pytest.mark.parametrize("method", ["generate", "tile", "encode_images", "chat"])
def test_max_tiles(golden_model: InternVL, method: str, count: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: golden_model.generate("What?", [SQUARE], max_tiles=count),
        "tile": lambda: golden_model.tile(SQUARE, count),
        "encode_images": lambda: golden_model.encode_images([SQUARE], count),
        "chat": lambda: golden_model.chat(max_tiles=count).send("What?", [SQUARE]),
    }
    assert refusal(LimitError, calls[method]) == f"max_tiles is {count}, it must be in 1..1024"


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
        {"seed": -1},
    ],
    ids=str,
)
def test_sampling(setting: Setting) -> None:
    ((name, value),) = setting.items()
    message = refusal(LimitError, Sampling, **setting)
    assert message.startswith(f"{name} is {value}, it must be ")


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({"threads": 0}, LimitError, "threads is 0, it must be at least 1"),
        ({"threads": -4}, LimitError, "threads is -4"),
        ({"max_context": 0}, LimitError, "max_context 0 is outside 1..1536 of this model"),
        ({"max_context": 1537}, LimitError, "max_context 1537 is outside 1..1536"),
        ({"device": "tpu"}, DeviceError, "unknown device 'tpu'; use auto, cpu, cuda, tensorrt"),
    ],
    ids=str,
)
def test_loading(
    golden_bundle: Path, settings: Setting, error: type[InternVLEdgeError], expected: str
) -> None:
    assert expected in refusal(error, InternVL.load, golden_bundle, **{"device": "cpu", **settings})


def test_device_that_is_not_there(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    message = refusal(DeviceError, InternVL.load, golden_bundle, device="cuda")
    assert "CUDAExecutionProvider" in message
    assert "install internvl-edge[gpu]; pass device='cpu'" in message


# A turn that fails.


def snapshot(chat: Chat) -> tuple[object, ...]:
    return list(chat.history), chat.cached_tokens


def bad_image(chat: Chat) -> None:
    chat.send("And this?", [b"not an image"])


def no_prompt(chat: Chat) -> None:
    chat.send("")


def too_long(chat: Chat) -> None:
    chat.send(SENTENCE * 100)


def missing_image(chat: Chat) -> None:
    chat.send("<image> or <image>?", [SQUARE])


def no_tokens(chat: Chat) -> None:
    chat.send("Hello!", [SQUARE], max_new_tokens=0)


@pytest.mark.parametrize("fail", [bad_image, no_prompt, too_long, missing_image, no_tokens])
@pytest.mark.parametrize("turns", [0, 1])
def test_failed_turn_leaves_the_chat_as_it_was(
    golden_model: InternVL, fail: Callable[[Chat], None], turns: int
) -> None:
    chats = [golden_model.chat() for _ in range(2)]
    for chat in chats[: 2 * turns]:
        chat.send("What is this?", [SQUARE], max_new_tokens=5)
    before = snapshot(chats[0])
    with pytest.raises((PromptError, LimitError, ImageError)):
        fail(chats[0])
    assert snapshot(chats[0]) == before
    failed, untouched = (chat.send("And this one?", [SQUARE], max_new_tokens=8) for chat in chats)
    assert failed.token_ids == untouched.token_ids
    assert failed.timings.prompt_tokens == untouched.timings.prompt_tokens
    assert failed.timings.cached_tokens == untouched.timings.cached_tokens


class BrokenError(RuntimeError):
    """What a backend might raise."""


@pytest.mark.parametrize("calls", [0, 3], ids=["prefill", "decode"])
def test_turn_that_breaks_half_way(
    golden_model: InternVL, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """An error of the backend: the turn is not in the history, not even as an empty answer."""
    chat, untouched = golden_model.chat(), golden_model.chat()
    for each in (chat, untouched):
        each.send("Hello!", max_new_tokens=5)
    history = list(chat.history)
    forward, left = OnnxRuntimeBackend.forward, [calls]

    def broken(self: OnnxRuntimeBackend, *arguments: Any) -> NDArray[np.float32]:
        if left[0] == 0:
            raise BrokenError
        left[0] -= 1
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeBackend, "forward", broken)
        with pytest.raises(BrokenError):
            chat.send("What is this?", [SQUARE])
    assert chat.history == history
    again, fresh = (
        each.send("And this?", [SQUARE], max_new_tokens=8) for each in (chat, untouched)
    )
    assert again.token_ids == fresh.token_ids
    assert len(chat.history) == 2


def test_image_that_breaks_the_vision_graph(
    golden_model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenError

    chat = golden_model.chat()
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeBackend, "encode_tiles", broken)
        stream = chat.stream("What is this?", [SQUARE])
        with pytest.raises(BrokenError):
            next(stream)
    stream.close()
    reply = chat.send("Hello!", max_new_tokens=5)
    assert chat.history == [("Hello!", reply.text)]
    assert reply.timings.tiles == 0
