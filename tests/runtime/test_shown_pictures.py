"""A conversation outlives the pictures it was shown, and holds no more of them than it needs."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver, on_device
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.runtime import Chat, InternVL

QUESTION = "What is written here, line by line?"
#: Near the trained length of 512: the next turn has another rotary base, and nothing is reused.
SYSTEM = "Look closely. " * 40
PIXELS = np.random.default_rng(3).integers(0, 256, (60, 80, 3), np.uint8)

Lose = Callable[[], None]


def encoded(pixels: NDArray[np.uint8] = PIXELS) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def a_file(path: Path) -> Any:
    (path / "a.png").write_bytes(encoded())
    return path / "a.png"


def deleted(path: Path) -> tuple[Any, Lose]:
    file = a_file(path)
    return file, file.unlink


def overwritten(path: Path) -> tuple[Any, Lose]:
    file = a_file(path)
    return str(file), lambda: file.write_bytes(encoded(255 - PIXELS)) and None


def damaged(path: Path) -> tuple[Any, Lose]:
    file = a_file(path)
    return file, lambda: file.write_bytes(b"none") and None


def closed(path: Path) -> tuple[Any, Lose]:
    image = Image.open(a_file(path))
    return image, image.close


def reused_array(path: Path) -> tuple[Any, Lose]:
    array = PIXELS.copy()
    return array, lambda: array.fill(7)


def reused_buffer(path: Path) -> tuple[Any, Lose]:
    buffer = bytearray(encoded())
    return buffer, lambda: buffer.__setitem__(slice(None), bytes(len(buffer)))


def converse(chat: Chat, image: Any, lose: Lose) -> list[list[int]]:
    """Beyond the trained length, where the picture is encoded again."""
    first = chat.send(QUESTION, [image], max_new_tokens=3)
    lose()
    second = chat.send("And then, in short, what was it that stood there?", max_new_tokens=24)
    third = chat.send("And?", max_new_tokens=3)
    assert second.timings.cached_tokens == 0
    return [reply.token_ids for reply in (first, second, third)]


@pytest.mark.parametrize("reuse", [0, 1 << 30])
@pytest.mark.parametrize(
    "kind", [deleted, overwritten, damaged, closed, reused_array, reused_buffer]
)
def test_a_chat_outlives_its_picture(
    golden_bundle: Path,
    golden_model: InternVL,
    tmp_path: Path,
    kind: Callable[[Path], tuple[Any, Lose]],
    reuse: int,
) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=reuse)
    got = converse(model.chat(system_message=SYSTEM, max_tiles=1), *kind(tmp_path))
    sound = golden_model.chat(system_message=SYSTEM, max_tiles=1)
    assert got == converse(sound, PIXELS, lambda: None)


def test_a_chat_outlives_a_picture_on_the_device(
    bindings: HostDriver, golden_bundle: Path, golden_model: InternVL
) -> None:
    model = InternVL.load(golden_bundle, device="cuda", threads=1, reuse_bytes=0)
    image = on_device(bindings, PIXELS)
    memory = bindings.memory[image.held.address]
    chat = model.chat(system_message=SYSTEM, max_tiles=1)
    got = converse(chat, image, lambda: memory.fill(0))
    sound = golden_model.chat(system_message=SYSTEM, max_tiles=1)
    assert got == converse(sound, PIXELS, lambda: None)


@pytest.mark.parametrize("side", [30, 90], ids=["file", "tiles"])
def test_after_a_turn_the_smaller_of_file_and_tiles_is_held(
    golden_model: InternVL, side: int
) -> None:
    """A tile is 56 x 56."""
    data = encoded(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    tiled = golden_model.tile_with_identity(data, 1)
    before = tiled.pixels()
    tiled.release()
    assert (tiled._held is None) == (side == 30) == (len(data) < before.nbytes)
    assert (tiled._cut is None) == (side == 90)
    np.testing.assert_array_equal(tiled.pixels(), before)


def test_the_callers_array_is_let_go(golden_model: InternVL) -> None:
    """A picture as large as a screen would stay as long as the conversation."""
    chat = golden_model.chat(max_tiles=1)
    image = Image.fromarray(PIXELS.copy())
    gone = weakref.ref(image)
    chat.send(QUESTION, [image], max_new_tokens=1)
    del image
    gc.collect()
    assert gone() is None
