"""Requests that are cancelled, left, interrupted or fail, and models that go: nothing stays."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
from many import ASKED, OTHER, PIXELS, alone, idle, same, spoil, until
from together import Together

from internvl_edge.runtime import (
    InternVL,
    Policy,
    PrecisionError,
    Progress,
    Reply,
    UsageError,
)
from internvl_edge.runtime.decoding.lane import Waiter
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.images.identity import TiledImage

pytestmark = pytest.mark.slow(seconds=1)


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


@pytest.mark.parametrize("pictures", [1, 6])
def test_close_leaves_a_batch_its_pictures(
    model: InternVL, golden_model: InternVL, pictures: int
) -> None:
    """None of them is of the model's own requests: it waited for ever for what was dropped."""
    asked: list[Any] = [
        {"prompt": "What?", "images": [PIXELS - part], "max_new_tokens": 3}
        for part in range(pictures)
    ]
    got = model.generate_batch(asked, progress=lambda _: model.close())
    same(got, [alone(golden_model, one) for one in asked])


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_what_progress_raises_ends_no_thread(model: InternVL, raised: type[BaseException]) -> None:
    """Nothing was answered by `agenerate` ever after."""

    def leave(how_far: Progress) -> None:
        raise raised

    async def ask(**options: Any) -> Reply:
        return await asyncio.wait_for(model.agenerate("What?", [PIXELS], **options), 30)

    with pytest.raises(raised):
        asyncio.run(ask(progress=leave))
    assert asyncio.run(ask(max_new_tokens=3)).token_ids


def test_a_second_task_is_told_that_an_answer_is_read(model: InternVL) -> None:
    """It waited for ever for the end, which the first had heard."""

    async def ask() -> list[Reply | BaseException]:
        stream = model.astream("Hello", max_new_tokens=3)
        both = asyncio.gather(stream.finish(), stream.finish(), return_exceptions=True)
        return [*await asyncio.wait_for(both, 30), await stream.finish()]

    first, second, again = asyncio.run(ask())
    assert isinstance(first, Reply)
    assert "is being read by another task" in str(second)
    assert again is first


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


def test_an_interrupt_where_a_picture_is_handed_over_leaves_the_lane_at_work(
    model: InternVL,
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    lane, waiter = model.answering.lane, Waiter(Request([1], ()), lambda: None)
    assert lane is not None
    for at in range(1, 300):
        first, then = (
            model.tile_with_identity(np.roll(PIXELS, turn * 300 + at), 1) for turn in (0, 1)
        )
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            lane.ask(first, waiter)
        encoding, _ = lane.ask(then, waiter)
        until(lambda encoding=encoding: encoding.ended)
        assert encoding.rows is not None
        if counted.seen < at:
            break
    assert 20 < at < 299


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
