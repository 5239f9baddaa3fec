"""Many at once: batches, asyncio and threads answer as each alone, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
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
    Sampling,
    UsageError,
)
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.images.identity import TiledImage

PIXELS = np.random.default_rng(3).integers(0, 256, (100, 150, 3), np.uint8)
OTHER = 255 - PIXELS
ASKED: list[Any] = [
    "Hello",
    {"prompt": "What is written here?", "images": [PIXELS], "max_tiles": 2},
    {"prompt": "Hello", "sampling": Sampling(temperature=1.3, seed=5)},
    {"prompt": "What is written here?", "images": [PIXELS, OTHER], "max_tiles": 2},
    {"prompt": "A longer question, " * 20, "max_new_tokens": 3},
    [5, 7, 9],
    {"messages": [{"role": "user", "content": "Hello"}], "stop": "a"},
]


@pytest.fixture
def model(golden_bundle: Path) -> Iterator[InternVL]:
    """Of several in a pass, one by one inside."""
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    model.engine.backend = Together(model.engine.backend, 4)
    yield model
    model.close()


def alone(model: InternVL, asked: Any, **options: Any) -> Reply:
    own = asked if isinstance(asked, dict) else {"prompt": asked}
    return model.generate(**{**options, **own})


@pytest.fixture(scope="module")
def wanted(golden_model: InternVL) -> list[Reply]:
    return [alone(golden_model, one, max_new_tokens=12) for one in ASKED]


def same(got: list[Reply], wanted: list[Reply]) -> None:
    assert [one.token_ids for one in got] == [one.token_ids for one in wanted]
    assert [one.text for one in got] == [one.text for one in wanted]
    assert [one.finish_reason for one in got] == [one.finish_reason for one in wanted]


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
    got = model.generate_batch(asked, max_tiles=6)
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
    async def read() -> list[str]:
        return [piece async for piece in model.astream("Hello", max_new_tokens=30)]

    assert asyncio.run(read()) == list(golden_model.stream("Hello", max_new_tokens=30))


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


def spoil(model: InternVL, grey: int) -> None:
    """Rows of tiles of one grey are no numbers from now on."""
    inner = model.engine.backend.encode_tiles

    def broken(tiles: Any) -> Any:
        rows = inner(tiles)
        rows[(tiles == np.uint8(grey)).all(axis=(1, 2, 3))] = np.nan
        return rows

    model.engine.backend.encode_tiles = broken  # type: ignore[method-assign]


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


def idle(model: InternVL) -> bool:
    """Whether nothing is under way in the model's threads."""
    lane = model.answering.lane
    assert lane is not None
    return not (model._background._all or lane._queue)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_a_cancelled_task_cancels_its_request(model: InternVL, pieces: int) -> None:
    async def ask() -> None:
        read: list[str] = []

        async def loop() -> None:
            stream = model.astream("What?", [PIXELS], max_new_tokens=500, ignore_eos=True)
            read.extend([piece async for piece in stream])

        async def count() -> None:
            stream = model.astream("What?", [PIXELS], max_new_tokens=500, ignore_eos=True)
            async for piece in stream:
                read.append(piece)

        task = asyncio.create_task(count() if pieces else loop())
        await asyncio.sleep(0.03)
        while len(read) < pieces:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    until(lambda: idle(model))


def test_a_stream_that_is_left_is_cancelled(model: InternVL) -> None:
    async def ask() -> Reply | None:
        async for _ in model.astream("Hello", max_new_tokens=500, ignore_eos=True):
            break
        gc.collect()
        stream = model.astream("Hello", max_new_tokens=500, ignore_eos=True)
        async for _ in stream:
            stream.cancel()
        return stream.reply

    reply = asyncio.run(ask())
    assert reply is not None
    assert reply.finish_reason == "cancelled"
    until(lambda: idle(model))


def test_the_threads_end_with_the_model(golden_bundle: Path) -> None:
    before = threading.active_count()
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    assert threading.active_count() == before
    for _ in range(2):  # and begin again
        assert asyncio.run(model.agenerate("What?", [PIXELS], max_new_tokens=3)).token_ids
        assert threading.active_count() > before
        model.close()
        until(lambda: threading.active_count() == before)
    asyncio.run(model.agenerate("What?", [OTHER], max_new_tokens=3))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    until(lambda: threading.active_count() == before)


def test_close_ends_what_is_under_way(model: InternVL) -> None:
    async def ask() -> Reply:
        stream = model.astream("Hello", max_new_tokens=500, ignore_eos=True)
        async for _ in stream:
            await asyncio.get_running_loop().run_in_executor(None, model.close)
            break
        return await stream.finish()

    assert asyncio.run(ask()).finish_reason == "cancelled"


def test_rows_are_waited_for_until_they_are_stored(golden_bundle: Path) -> None:
    """The last tile is encoded before its rows are put together, in another thread."""
    model = InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=0)
    store = model.answering.encoder._store
    put = store.put

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return put(*arguments)

    store.put = slowly  # type: ignore[method-assign]
    asked = {"prompt": "What?", "images": [PIXELS], "max_new_tokens": 4}
    hello = {"prompt": "Hello", "max_new_tokens": 200, "ignore_eos": True}  # decodes meanwhile
    (got, _) = model.generate_batch([asked, hello])
    store.put = put  # type: ignore[method-assign]
    same([got], [alone(model, asked)])
    model.close()


def test_an_interrupted_batch_leaves_nothing_under_way(
    model: InternVL, wanted: list[Reply]
) -> None:
    """At moments that are spread over all of it; the next batch is answered as ever."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    counted = Moments(10**9, interrupt)
    with counted:
        model.generate_batch(ASKED[:4], max_new_tokens=5)
    for part in range(25):
        fresh = [{**ASKED[1], "images": [PIXELS - part]}, *ASKED[:4]]
        with suppress(KeyboardInterrupt), Moments(1 + counted.seen * part // 25, interrupt):
            model.generate_batch(fresh, max_new_tokens=5)
        until(lambda: idle(model))
        assert model.answering.reservations.promised == 0
        same(model.generate_batch(ASKED[:3], max_new_tokens=12), wanted[:3])


@pytest.mark.parametrize("asked", [{"images": [np.full_like(PIXELS, 77)]}, {"max_new_tokens": 0}])
def test_what_failed_is_let_go_of_at_once(model: InternVL, asked: dict[str, Any]) -> None:
    """Without the interpreter's search for circles, which comes late: pictures are large."""
    spoil(model, 77)

    async def ask() -> None:
        with pytest.raises((PrecisionError, UsageError)):
            await model.agenerate("What?", **asked)

    def requests() -> int:
        return sum(isinstance(one, Request) for one in gc.get_objects())

    gc.collect()
    before = requests()
    gc.disable()
    try:
        asyncio.run(ask())
        until(lambda: idle(model) and requests() == before)
    finally:
        gc.enable()


def test_a_batch_holds_what_is_under_way(golden_bundle: Path) -> None:
    """Not the pictures of all that it has answered, nor of those that are still to come."""
    model = InternVL.load(golden_bundle, device="cpu", threads=1, policy=Policy(most_running=2))
    alive: list[int] = []

    def asked() -> Iterator[Any]:
        for number in range(20):
            alive.append(sum(isinstance(one, TiledImage) for one in gc.get_objects()))
            yield {"prompt": "What?", "images": [PIXELS - number], "max_new_tokens": 2}

    gc.collect()
    assert len(model.generate_batch(asked())) == 20
    assert max(alive) - alive[0] <= 4
    model.close()
