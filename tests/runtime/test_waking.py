"""A wait is ended from anywhere, by whoever interrupts it too."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from campaign.interrupts import Moments
from many import LONG_S, finishes

from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.request import Reply, Request
from internvl_edge.runtime.decoding.scheduler import Scheduler
from internvl_edge.runtime.decoding.waking import Waking


def test_a_wait_ends_when_it_is_woken() -> None:
    waking = Waking()
    waking.wait(0)
    waking.wake()
    waking.wake()
    waking.wait(LONG_S)
    waking.forget()
    other = threading.Timer(0.01, waking.wake)
    other.start()
    waking.wait(LONG_S)
    other.join()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_wait_leaves_nothing_locked() -> None:
    def at_every_moment() -> None:
        for at in range(1, 200):
            waking = Waking()
            waking.wake()
            counted = Moments(at, interrupt)
            with suppress(KeyboardInterrupt), counted:
                waking.forget()
                waking.wait(0)
            waking.wake()
            waking.wait(LONG_S)
            moments.append(at)
            if counted.seen < at:
                break

    moments: list[int] = []
    finishes(at_every_moment)
    assert 5 < moments[-1] < 199


@pytest.mark.slow
def test_a_step_may_be_cancelled_in_its_midst(golden_model: InternVL) -> None:
    """As a signal's handler does, or the end of a stream that is collected there.

    All moments up to the pass are tried, and some of the others.
    """
    ids = golden_model.inputs.conversation([("Hello", None)], [], None)
    whole = golden_model.generate(ids, max_new_tokens=4)

    def at_every_moment() -> None:
        for at in [*range(1, 150), *range(150, 3000, 30)]:
            scheduler = Scheduler(golden_model.answering)
            handle = scheduler.add(Request(ids, (), max_new_tokens=4))
            scheduler.step()
            with Moments(at, handle.cancel) as counted:
                scheduler.step()
            while handle.alive:
                scheduler.step()
            replies.append((counted.seen >= at, handle.reply))
            if counted.seen < at:
                break

    replies: list[tuple[bool, Reply | None]] = []
    finishes(at_every_moment)
    assert 150 < len(replies) < 240
    for cancelled, reply in replies:
        assert reply is not None
        assert reply.finish_reason == ("cancelled" if cancelled else whole.finish_reason)
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
