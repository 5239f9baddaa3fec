"""A conversation is data: saved with its pictures, restored equal, and gone on with."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_edge.runtime import (
    Chat,
    ContextError,
    ImageError,
    InternVL,
    InternVLEdgeError,
    LimitError,
    OutputError,
    Picture,
    PromptError,
    Remedy,
    UsageError,
)

PIXELS = np.random.default_rng(3).integers(0, 256, (60, 80, 3), np.uint8)
#: Of which the tiles are smaller than the file.
LARGE = np.random.default_rng(4).integers(0, 256, (200, 300, 3), np.uint8)
SHORT: dict[str, Any] = {"max_new_tokens": 6}
THIRD = "Which one is larger?"


def png(pixels: Any, **more: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **more)
    return stream.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(PIXELS, exif=exif)


def two_turns(model: InternVL, first: Any, second: Any) -> Chat:
    chat = model.chat(system_message="Look.", max_tiles=2)
    chat.send("What is this?", [first], **SHORT)
    chat.send("And these?", [second, first], **SHORT)
    return chat


@pytest.mark.parametrize(
    "picture",
    [
        png(PIXELS),
        png(LARGE),
        PIXELS,
        Image.fromarray(LARGE),
        Picture(rotated(), upright=True, max_tiles=3),
        Picture(rotated(), frame=0),
    ],
    ids=["file", "tiles of a file", "array", "image", "upright", "frame"],
)
def test_a_saved_chat_is_restored_equal(
    golden_model: InternVL, tmp_path: Path, picture: Any
) -> None:
    chat = two_turns(golden_model, PIXELS, picture)
    told = chat.messages()
    chat.save(tmp_path / "chat.json")
    history = list(chat.history)
    wanted = chat.send(THIRD, max_new_tokens=8)
    assert json.loads((tmp_path / "chat.json").read_text("utf-8")) == told
    for messages in (tmp_path / "chat.json", str(tmp_path / "chat.json"), told):
        again = golden_model.chat(messages=messages, max_tiles=2)
        assert again.history == history
        assert again.messages() == told
        got = again.send(THIRD, max_new_tokens=8)
        assert got.token_ids == wanted.token_ids
        assert got.timings.prompt_tokens == wanted.timings.prompt_tokens
        assert [image.size for image in again._images] == [image.size for image in chat._images]


def test_history_is_another_name_of_messages(golden_model: InternVL) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first, second = golden_model.chat(history=said), golden_model.chat(messages=said)
    assert first.messages() == second.messages()
    with pytest.raises(LimitError, match="history"):
        golden_model.chat(history=said, messages=said)


def test_tiles_of_the_saved_chat_are_kept_whatever_the_next_one_is_told(
    golden_model: InternVL, tmp_path: Path
) -> None:
    chat = two_turns(golden_model, PIXELS, png(LARGE))
    chat.save(tmp_path / "chat.json")
    wanted = chat.send(THIRD, **SHORT)
    got = golden_model.chat(messages=tmp_path / "chat.json").send(THIRD, **SHORT)
    assert got.token_ids == wanted.token_ids


def test_in_another_process(golden_model: InternVL, golden_bundle: Path, tmp_path: Path) -> None:
    chat = two_turns(golden_model, PIXELS, png(LARGE))
    chat.save(tmp_path / "chat.json")
    wanted = chat.send(THIRD, **SHORT)
    script = (
        "import sys; from internvl_edge.runtime import InternVL;"
        "model = InternVL.load(sys.argv[1], device='cpu', threads=1);"
        "chat = model.chat(messages=sys.argv[2], max_tiles=2);"
        f"print(chat.send({THIRD!r}, max_new_tokens=6).token_ids)"
    )
    command = [sys.executable, "-c", script, str(golden_bundle), str(tmp_path / "chat.json")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout) == wanted.token_ids


def test_pictures_from_files_are_told_by_path_where_that_is_asked(
    golden_model: InternVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "größe 1.png").write_bytes(png(PIXELS))
    monkeypatch.chdir(tmp_path)
    chat = two_turns(golden_model, "größe 1.png", Picture("größe 1.png", max_tiles=1))
    chat.save("chat.json", embed=False)
    text = (tmp_path / "chat.json").read_text("utf-8")
    assert "base64" not in text
    assert (tmp_path / "größe 1.png").as_uri() in text
    wanted = chat.send(THIRD, **SHORT)
    monkeypatch.chdir("/")
    again = golden_model.chat(messages=tmp_path / "chat.json")
    assert again.send(THIRD, **SHORT).token_ids == wanted.token_ids
    (tmp_path / "größe 1.png").unlink()
    with pytest.raises(ImageError, match=r"^messages\[1\]\.content\[0\]: cannot read image"):
        golden_model.chat(messages=tmp_path / "chat.json")


def test_a_picture_that_is_gone_is_saved_as_the_chat_holds_it(
    golden_model: InternVL, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(PIXELS))
    array = LARGE.copy()
    chat = two_turns(golden_model, path, array)
    path.unlink()
    array[:] = 0
    chat.save(tmp_path / "chat.json")
    wanted = chat.send(THIRD, **SHORT)
    again = golden_model.chat(messages=tmp_path / "chat.json", max_tiles=2)
    assert again.send(THIRD, **SHORT).token_ids == wanted.token_ids


def test_nothing_is_overwritten_unless_told(golden_model: InternVL, tmp_path: Path) -> None:
    chat = golden_model.chat()
    path = tmp_path / "chat.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists; pass overwrite=True"):
        chat.save(path)
    assert path.read_text() == "mine"
    chat.save(path, overwrite=True)
    assert path.read_text() == "[]"
    assert golden_model.chat(messages=path).history == []
    for place in (tmp_path, tmp_path / "none" / "chat.json"):
        with pytest.raises(OutputError):
            chat.save(place, overwrite=True)
    with pytest.raises(UsageError, match=r"^path is .*, it is no path: "):
        chat.save("\ud800")
    assert os.listdir(tmp_path) == ["chat.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read messages of"),
        ("{", "cannot read messages of"),
        ('{"a": 1}', "messages are a list of role and content"),
        ('[{"role": "user", "content": "a"}]', "must end with an assistant message"),
    ],
)
def test_a_file_that_is_no_chat(
    golden_model: InternVL, tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PromptError, match=said):
        golden_model.chat(messages=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tiles": 0}, "tiles is 0, it must be at least 1"),
        ({"tiles": "many"}, "tiles is 'many', it must be a whole number"),
        ({"tiles": 3}, "80 x 60 pixels are not 3 square tiles"),
        ({"tiles": 1, "size": [1]}, "expected width and height"),
        ({"tiles": 1, "size": [0, 1]}, "expected width and height"),
        ({"frame": -1}, r"content\[0\]: frame is -1"),
        ({"upright": "yes"}, "upright is 'yes', it must be True or False"),
        ({"max_tiles": 0}, "max_tiles is 0, it must be in 1"),
    ],
)
def test_options_of_an_image(golden_model: InternVL, options: dict[str, Any], said: str) -> None:
    part = {"type": "image", "image": png(PIXELS), **options}
    content = [part, {"type": "text", "text": "What?"}]
    with pytest.raises(InternVLEdgeError, match=said):
        golden_model.generate(messages=[{"role": "user", "content": content}])


def test_a_full_chat_says_what_helps(golden_model: InternVL) -> None:
    chat = golden_model.chat()
    chat.history = [(f"Question {number}?", "An answer. " * 40) for number in range(20)]
    with pytest.raises(ContextError, match=r"begin a new chat, pass drop_oldest=True") as caught:
        chat.send("And?")
    assert list(caught.value.remedies)[:2] == [Remedy.NEW_CHAT, Remedy.DROP_OLDEST]
    with pytest.raises(ContextError) as caught:
        golden_model.chat().send("word " * 3000)
    assert Remedy.NEW_CHAT not in caught.value.remedies


def test_a_full_chat_drops_its_oldest_turns(golden_model: InternVL) -> None:
    full = [("Look: <image>", "yes")]
    full += [(f"Question {number}?", "An answer. " * 40) for number in range(20)]
    chat = golden_model.chat(drop_oldest=True, max_tiles=1)
    chat.send("Look: <image>", [PIXELS], **SHORT)
    chat.history = list(full)
    reply = chat.send("And <image>?", [LARGE], **SHORT)
    for first in range(1, len(full)):
        tiled = [golden_model.tile_with_identity(LARGE, 1)]
        turns = [*full[first:], ("And <image>?", None)]
        ids = golden_model.encode_conversation(turns, tiled, None)
        if len(ids) == reply.timings.prompt_tokens:
            break
    assert first > 1
    assert golden_model.generate(ids, [LARGE], max_tiles=1, **SHORT).token_ids == reply.token_ids
    assert golden_model.max_context // 2 < len(ids) <= golden_model.max_context - 6
    assert len(chat.history) == len(full) + 1
    assert len(chat.messages()) == 2 * len(chat.history)
    with pytest.raises(ContextError, match="; begin a new chat"):
        chat.send("word " * 3000)
