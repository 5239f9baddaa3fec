"""Conversations as messages: read as they were said, gone on with, or refused by place."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.runtime import Chat, ImageError, InternVL, InternVLEdgeError, PromptError
from internvl_edge.runtime.messages import read_messages

PIXELS = np.random.default_rng(3).integers(0, 256, (60, 80, 3), np.uint8)
OTHER = 255 - PIXELS
ASKED: dict[str, Any] = {"max_tiles": 2, "max_new_tokens": 6}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(value: Any) -> dict[str, Any]:
    return {"type": "image", "image": value}


def image_url(value: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": value}}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def stored(chat: Chat, *pictures: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
    """A chat's history as messages, with the pictures of each turn."""
    messages = []
    for (question, answer), shown in zip(chat.history, pictures, strict=True):
        messages += [user(*map(image, shown), text(question)), assistant(answer)]
    return messages


def test_a_question_is_the_prompt_with_its_images(golden_model: InternVL) -> None:
    for prompt, images in (("Hello", []), ("What?", [PIXELS]), ("Both?", [PIXELS, OTHER])):
        wanted = golden_model.generate(prompt, images, **ASKED)
        parts = [*map(image, images), text(prompt)]
        for messages in ([user(*parts)], ({"role": "user", "content": parts},)):
            got = golden_model.generate(messages=messages, **ASKED)
            assert got.token_ids == wanted.token_ids
            assert got.timings.prompt_tokens == wanted.timings.prompt_tokens
    got = golden_model.generate(messages=[{"role": "user", "content": "Hello"}], **ASKED)
    assert got.token_ids == golden_model.generate("Hello", **ASKED).token_ids


def test_an_image_stands_where_it_was_put(golden_model: InternVL) -> None:
    asked = [user(text("One:"), image(PIXELS), text("and two:"), image(OTHER))]
    told = read_messages(asked, golden_model.inputs)
    assert told.turns == [("One:\n<image>\nand two:\n<image>", None)]
    assert [picture.place for picture in told.pictures] == [
        "messages[0].content[1]",
        "messages[0].content[3]",
    ]


def test_images_are_numbered_through_the_conversation(golden_model: InternVL) -> None:
    asked = [user(image(PIXELS), text("A?")), assistant("a"), user(image(OTHER), text("B?"))]
    told = read_messages(asked, golden_model.inputs)
    assert told.turns == [("<image>\nA?", "a"), ("Image-2: <image>\nB?", None)]


@pytest.mark.parametrize("way", ["chat", "generate", "stream"])
def test_a_stored_conversation_goes_on(golden_model: InternVL, way: str) -> None:
    chat = golden_model.chat(system_message="Look.", max_tiles=2)
    chat.send("What is this?", [PIXELS], max_new_tokens=6)
    chat.send("And these?", [OTHER, PIXELS], max_new_tokens=6)
    messages = stored(chat, [PIXELS], [OTHER, PIXELS])
    wanted = chat.send("Which one is larger?", max_new_tokens=8)
    told = [{"role": "system", "content": "Look."}, *messages]
    if way == "chat":
        again = golden_model.chat(messages=told, max_tiles=2)
        assert again.history == chat.history[:-1]
        got = again.send("Which one is larger?", max_new_tokens=8)
        assert again.history == chat.history
    else:
        told.append({"role": "user", "content": "Which one is larger?"})
        if way == "stream":
            got = golden_model.stream(messages=told, max_tiles=2, max_new_tokens=8).finish()
        else:
            got = golden_model.generate(messages=told, max_tiles=2, max_new_tokens=8)
    assert got.token_ids == wanted.token_ids
    assert got.timings.prompt_tokens == wanted.timings.prompt_tokens


def test_pictures_come_by_path_file_or_data_uri(golden_model: InternVL, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    Image.fromarray(PIXELS).save(path)
    data = base64.b64encode(path.read_bytes()).decode()
    wanted = golden_model.generate("What?", [PIXELS], **ASKED).token_ids
    for part in (
        image_url(str(path)),
        image_url(path.as_uri()),
        image_url(f"data:image/png;base64,{data}"),
        {"type": "image_url", "image_url": path.as_uri()},
        image(path),
        image(str(path)),
        image(path.as_uri()),
        image(path.read_bytes()),
        image(Image.open(io.BytesIO(path.read_bytes()))),
    ):
        got = golden_model.generate(messages=[user(part, text("What?"))], **ASKED)
        assert got.token_ids == wanted


HELLO = {"role": "user", "content": "Hello"}
BAD: list[tuple[Any, str]] = [
    ("Hello", "messages are a list of role and content, not 'Hello'"),
    (HELLO, "messages are a list of role and content, not {"),
    (7, "messages are a list"),
    (["Hello"], r"messages\[0\] is 'Hello'; expected role and content"),
    ([{"content": "a"}], r"messages\[0\] has no role"),
    ([{"role": "user"}], r"messages\[0\] has no content"),
    ([{"role": "tool", "content": "a"}], r"messages\[0\]\.role is 'tool'; expected system"),
    ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role is \['user'\]"),
    ([HELLO, HELLO], r"messages\[1\] has the role 'user'; expected assistant here"),
    ([assistant("a"), HELLO], r"messages\[0\] has the role 'assistant'; expected user here"),
    ([HELLO, {"role": "system", "content": "a"}], r"messages\[1\] is a system message"),
    ([{"role": "user", "content": None}], r"messages\[0\]\.content is None; expected a string"),
    ([{"role": "user", "content": b"a"}], r"messages\[0\]\.content is b'a'"),
    ([{"role": "user", "content": " "}], r"messages\[0\]\.content: the prompt is empty"),
    ([user("Hello")], r"messages\[0\]\.content\[0\] is 'Hello'; expected a part"),
    ([user({"type": "audio"})], r"messages\[0\]\.content\[0\] is \{'type': 'audio'\}"),
    ([user({"type": ["text"]})], r"messages\[0\]\.content\[0\] is"),
    ([user(text("a"), text(7))], r"messages\[0\]\.content\[1\]\.text is 7; expected a string"),  # type: ignore[arg-type]
    ([user({"type": "image"})], r"messages\[0\]\.content\[0\]\.image is None"),
    ([user(image_url(None))], r"messages\[0\]\.content\[0\]\.image_url is None"),
    ([user(image_url(b"a"))], r"messages\[0\]\.content\[0\]\.image_url is b'a'"),
    ([user(text("<image>?"))], r"messages\[0\]\.content: the prompt has 1 <image> for 0 images"),
    ([HELLO, assistant([image(PIXELS)]), HELLO], r"messages\[1\]\.content\[0\] is an image; only"),
    ([HELLO, assistant("a")], "messages must end with a user message"),
    ([], "messages must end with a user message"),
]
UNREADABLE = [
    (
        image_url("https://example.com/a.png"),
        "is on the network, where nothing is fetched from here; download it",
    ),
    (image_url("file://elsewhere/a.png"), "names another machine"),
    (image_url("data:image/png,abc"), "3 bytes of a data URI is not an image"),
    (image_url("data:image/png;base64,a*b"), "is no base64"),
    (image_url("data:image/png;base64,AAAA"), "bytes of a data URI is not an image"),
    (image_url("nowhere.png"), "cannot read image 'nowhere.png'"),
    (image(7), "an image is a path, a URI, bytes"),
]


@pytest.mark.parametrize(("messages", "said"), BAD, ids=[said for _, said in BAD])
def test_what_is_no_conversation_is_refused_by_its_place(
    golden_model: InternVL, messages: Any, said: str
) -> None:
    for ask in (golden_model.generate, golden_model.stream):
        with pytest.raises(PromptError, match=said) as caught:
            ask(messages=messages)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "said"), UNREADABLE, ids=[said for _, said in UNREADABLE])
def test_a_picture_that_cannot_be_had_is_named(
    golden_model: InternVL, part: dict[str, Any], said: str
) -> None:
    turn = [user(text("First")), assistant("a"), user(part, text("What?"))]
    with pytest.raises(ImageError, match=r"^messages\[2\]\.content\[0\]: ") as caught:
        golden_model.generate(messages=turn)
    assert said in str(caught.value)
    with pytest.raises(ImageError, match=r"^messages\[2\]\.content\[0\]: "):
        golden_model.chat(messages=[*turn, assistant("b")])


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "Hello", "messages": [HELLO]},
        {"images": [PIXELS], "messages": [HELLO]},
        {},
        {"system_message": "a", "messages": [{"role": "system", "content": "b"}, HELLO]},
    ],
    ids=["prompt", "images", "nothing", "system"],
)
def test_what_is_asked_is_said_once(golden_model: InternVL, given: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        golden_model.generate(**given)


def test_a_chat_begins_after_an_answer(golden_model: InternVL) -> None:
    with pytest.raises(InternVLEdgeError, match="must end with an assistant message; pass the"):
        golden_model.chat(messages=[HELLO])
