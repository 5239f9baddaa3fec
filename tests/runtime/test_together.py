"""Many at once: batches, asyncio and threads answer as each alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from many import ASKED, OTHER, PIXELS, alone, same, spoil
from numpy.typing import NDArray
from PIL import Image
from together import Together

from internvl_edge.runtime import (
    ImageError,
    InternVL,
    LimitError,
    Policy,
    PrecisionError,
    PromptError,
    Reply,
    UsageError,
)


@pytest.fixture
def model(golden_bundle: Path) -> Iterator[InternVL]:
    """Of several in a pass, one by one inside."""
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    model.engine.backend = Together(model.engine.backend, 4)
    yield model
    model.close()


@pytest.fixture(scope="module")
def wanted(golden_model: InternVL) -> list[Reply]:
    return [alone(golden_model, one, max_new_tokens=12) for one in ASKED]


def test_a_batch_is_answered_as_each_alone(model: InternVL, wanted: list[Reply]) -> None:
    same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    same(model.generate_batch(ASKED * 3, max_new_tokens=12), wanted * 3)
    assert model.generate_batch([]) == []


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_golden_answers_in_one_batch(
    golden_bundle: Path,
    golden_images: dict[str, Image.Image],
    golden_chats: dict[str, dict[str, Any]],
    chat_arrays: dict[str, NDArray[Any]],
    concurrency: int,
) -> None:
    """What the reference implementation answered each alone, in float32."""
    policy = Policy(most_running=concurrency)
    model = InternVL.load(golden_bundle, device="cpu", threads=1, policy=policy)
    shown = {"single": ["img0"], "multi_image": ["img0", "img1"], "text_only": []}
    asked, wanted = [], []
    for name in [*shown, *shown, *shown]:
        wanted.append(chat_arrays[f"{name}_generated"][0].tolist())
        asked.append(
            {
                "prompt": golden_chats[name]["question"],
                "images": [golden_images[stem] for stem in shown[name]],
                "max_new_tokens": len(wanted[-1]),
            }
        )
    got = model.generate_batch(asked, max_tiles=6, extra_stops=False)
    assert [one.token_ids for one in got] == wanted
    model.close()


def test_awaited_together(model: InternVL, wanted: list[Reply]) -> None:
    async def ask() -> list[Reply]:
        answers = (
            model.agenerate(**{"max_new_tokens": 12, **one})
            if isinstance(one, dict)
            else model.agenerate(one, max_new_tokens=12)
            for one in ASKED
        )
        return await asyncio.gather(*answers)

    same(asyncio.run(ask()), wanted)
    same(asyncio.run(ask()), wanted)  # in another event loop


def test_pieces_are_those_of_a_stream(model: InternVL, golden_model: InternVL) -> None:
    """Of a token each: what is guessed right comes at once in a stream, as the pace allows."""
    asked: dict[str, Any] = {"max_new_tokens": 30, "sampling": {"speculate": 0}}

    async def read() -> list[str]:
        return [piece async for piece in model.astream("Hello", **asked)]

    assert asyncio.run(read()) == list(golden_model.stream("Hello", **asked))


def test_threads_and_tasks_share_a_model(model: InternVL, wanted: list[Reply]) -> None:
    def ask(one: Any) -> Reply:
        return alone(model, one, max_new_tokens=12)

    def batch(_: int) -> list[Reply]:
        return model.generate_batch(ASKED, max_new_tokens=12)

    async def gather() -> list[Reply]:
        return list(
            await asyncio.gather(*(model.agenerate("Hello", max_new_tokens=12) for _ in range(9)))
        )

    with ThreadPoolExecutor(4) as pool:
        batches = [pool.submit(batch, number) for number in range(2)]
        tasks = pool.submit(asyncio.run, gather())
        same(list(pool.map(ask, ASKED)), wanted)
        for each in batches:
            same(each.result(), wanted)
        same(tasks.result(), wanted[:1] * 9)


def counting(model: InternVL) -> list[int]:
    """Tiles of every vision pass from now on."""
    passes: list[int] = []
    inner = model.engine.backend.encode_tiles

    def encode(tiles: Any) -> Any:
        passes.append(len(tiles))
        time.sleep(0.02)  # others arrive meanwhile
        return inner(tiles)

    model.engine.backend.encode_tiles = encode  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("reuse", [0, 1 << 30])
def test_a_picture_of_several_requests_is_encoded_once(golden_bundle: Path, reuse: int) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=reuse)
    passes = counting(model)
    asked = {"prompt": "What?", "images": [PIXELS], "max_new_tokens": 4}
    got = model.generate_batch([asked] * 5)
    tiles = len(model.tile(PIXELS))
    assert sum(passes) == tiles
    assert sum(one.timings.tiles for one in got) == tiles
    same(got, [alone(model, asked)] * 5)
    model.close()


def test_tiles_of_several_pictures_are_in_one_pass(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=0)
    passes = counting(model)
    asked = [{"prompt": "What?", "images": [one]} for one in (PIXELS, OTHER, PIXELS // 2)]
    got = model.generate_batch(asked, max_new_tokens=4, max_tiles=1)
    assert sum(passes) == 3
    assert len(passes) < 3  # the first, at most, alone
    same(got, [alone(model, one, max_new_tokens=4, max_tiles=1) for one in asked])
    model.close()


def test_a_prompt_of_several_requests_is_read_once(model: InternVL) -> None:
    """However little is kept afterwards."""
    prompt = "word " * 60
    got = model.generate_batch([prompt] * 4, max_new_tokens=4)
    tokens = got[0].timings.prompt_tokens
    assert [one.timings.cached_tokens for one in got] == [0, *[tokens - 1] * 3]


def test_the_first_error_is_raised_after_all(model: InternVL, wanted: list[Reply]) -> None:
    asked = [ASKED[0], {"prompt": "<image>"}, ASKED[1], {"prompt": "Hello", "max_new_tokens": 0}]
    with pytest.raises(PromptError):
        model.generate_batch(asked, max_new_tokens=12)
    got = model.generate_batch(asked, max_new_tokens=12, return_errors=True)
    assert [type(one) for one in got] == [Reply, PromptError, Reply, UsageError]
    same([got[0], got[2]], wanted[:2])


def test_wrong_options_are_told_at_once(model: InternVL) -> None:
    with pytest.raises(UsageError, match="there is no option 'max_token'"):
        model.generate_batch(["Hello"], max_token=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="there is no option 'picture'"):
        model.generate_batch([{"prompt": "Hello", "picture": PIXELS}])
    with pytest.raises(UsageError, match="return_errors is 3"):
        model.generate_batch(["Hello"], return_errors=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no option 'max_token'"):
        asyncio.run(model.agenerate("Hello", max_token=3))  # type: ignore[call-arg]
    with pytest.raises(ImageError):
        asyncio.run(model.agenerate("Hello", ["no such file.png"]))
    with pytest.raises(LimitError):
        asyncio.run(model.agenerate("word " * 5000))


def test_an_error_is_its_requests_own(model: InternVL, wanted: list[Reply]) -> None:
    spoil(model, 77)
    grey = np.full_like(PIXELS, 77)

    async def ask() -> list[Any]:
        answers = [
            model.agenerate("What is written here?", [image], max_new_tokens=12, max_tiles=2)
            for image in (PIXELS, grey, grey)
        ]
        return await asyncio.gather(*answers, return_exceptions=True)

    got = asyncio.run(ask())
    assert [type(one) for one in got] == [Reply, PrecisionError, PrecisionError]
    same(got[:1], wanted[1:2])


@pytest.mark.parametrize("one", ["Hello", {"prompt": "Hello"}], ids=["text", "by name"])
def test_one_prompt_is_a_batch_of_one(model: InternVL, one: Any) -> None:
    """Not its letters, and not the names of its arguments."""
    (reply,) = model.generate_batch(one, max_new_tokens=4)
    assert reply.token_ids == model.generate("Hello", max_new_tokens=4).token_ids


@pytest.mark.parametrize("given", [None, 5, b"Hello", np.array(3)], ids=repr)
def test_what_is_no_batch_is_named(model: InternVL, given: Any) -> None:
    with pytest.raises(PromptError, match=r"^prompts is .* it must be a prompt, or a list of them"):
        model.generate_batch(given)


def test_what_is_to_be_returned_is_asked_before_it_is_computed(model: InternVL) -> None:
    taken: list[int] = []
    with pytest.raises(UsageError, match=r"^return_errors is 'no', it must be True or False"):
        model.generate_batch(map(str, map(taken.append, [1])), return_errors=cast(Any, "no"))
    assert not taken
