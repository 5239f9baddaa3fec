"""Whatever requests come, go, fail and wait: each is answered as alone, in the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from counted import POSITION_BYTES, CountedBackend
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from many import until

from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.runtime import CapacityError, InternVL, Policy, PrecisionError, Sampling
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.decoding.encoding import ImageEncoder
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.lane import VisionLane
from internvl_edge.runtime.decoding.passes import Engine
from internvl_edge.runtime.decoding.request import Event, Request
from internvl_edge.runtime.decoding.reservations import Reservations
from internvl_edge.runtime.decoding.reuse import ImageStore, PrefixStore
from internvl_edge.runtime.decoding.scheduler import Scheduler
from internvl_edge.runtime.decoding.shelf import Shelf

TILE_BYTES = 300
#: Positions under one rotary base.
TRAINED = 128
#: Beginnings that prompts share, and not.
BEGINNINGS = ([], list(range(10, 40)), list(range(10, 90)))


@cache
def tiny() -> InternVL:
    return InternVL.load(example_room() / "bundle", device="cpu", threads=1)


@cache
def spec() -> ModelSpec:
    """The small model's, beyond whose trained length positions have rotary bases of their own."""
    told = tiny().spec
    return replace(told, language=replace(told.language, max_position_embeddings=TRAINED))


def cost(positions: int, tiles: int) -> int:
    return positions * POSITION_BYTES + tiles * TILE_BYTES


def answering(backend: CountedBackend, policy: Policy, reuse: int) -> Answering:
    model = tiny()
    shelf = Shelf(reuse)
    prefixes = PrefixStore(shelf)
    engine = Engine(backend, spec(), model.engine._embedding, prefixes)
    return replace(
        model.answering,
        engine=engine,
        encoder=ImageEncoder(engine, ImageStore(shelf), model.answering.finite),
        prefixes=prefixes,
        policy=policy,
        reservations=Reservations(cost, None, policy.memory_bytes),
        max_context=5 * TRAINED,
        lane=None,
    )


@dataclass(frozen=True)
class Question:
    """What is asked: a beginning, a number that no other has, pictures, tokens of the answer."""

    beginning: int
    number: int
    pictures: tuple[int, ...]
    tokens: int
    seed: int | None
    priority: int = 0

    def request(self) -> Request:
        model = tiny()
        tiled = [model.inputs.tiles(picture(number)) for number in self.pictures]
        rows = sum(map(model.inputs.rows, tiled))
        ids = [*BEGINNINGS[self.beginning], *[model.context_id] * rows, 7, self.number % 200 + 3]
        sampling = Sampling() if self.seed is None else Sampling(temperature=1.0, seed=self.seed)
        return Request(
            ids,
            (2,),
            tiled,
            max_new_tokens=self.tokens,
            sampling=sampling,
            priority=self.priority,
        )


@cache
def picture(number: int) -> Any:
    side = tiny().spec.vision.tile_size
    return np.full((number % 3 + 1, side, side, 3), number, np.uint8)


@cache
def alone(question: Question) -> list[int]:
    """Its answer, with nobody else there and nothing kept."""
    backend = CountedBackend(spec())
    scheduler = Scheduler(answering(backend, Policy(ahead=10_000), 0))
    handle = scheduler.add(question.request())
    while handle.alive:
        scheduler.step()
    return handle.ids


questions = st.builds(
    Question,
    beginning=st.integers(0, len(BEGINNINGS) - 1),
    number=st.integers(0, 10_000),
    pictures=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    tokens=st.integers(1, 40) | st.integers(1, 700),
    seed=st.none() | st.integers(0, 9),
    priority=st.integers(-1, 1),
)


class Requests(RuleBasedStateMachine):
    """Requests join, are cancelled, fail; the memory is small."""

    @initialize(
        slices=st.sampled_from([1, 2, 64]),
        most_running=st.sampled_from([1, 3, 32]),
        memory=st.sampled_from([6_000, 12_000, 1_000_000]),
        ahead=st.sampled_from([1, 16, 256]),
        growth=st.sampled_from([0.0, 1.0]),
        reuse=st.sampled_from([0, 4_000, 1 << 20]),
        lane=st.booleans(),
        drafts=st.booleans(),
    )
    def begin(
        self,
        slices: int,
        most_running: int,
        memory: int,
        ahead: int,
        growth: float,
        reuse: int,
        lane: bool,
        drafts: bool,
    ) -> None:
        self.policy = Policy(
            most_running=most_running, growth=growth, memory_bytes=memory, ahead=ahead
        )
        self.backend = CountedBackend(spec(), slices, drafts)
        self.means = answering(self.backend, self.policy, reuse)
        self.lane = VisionLane(self.means.encoder, self.means.policy) if lane else None
        self.scheduler = Scheduler(self.means, self.lane)
        self.asked: list[tuple[Question, Handle]] = []
        self.events: list[Event] = []
        self.begun: list[Handle] = []
        self.raised: list[Exception] = []

    @rule(question=questions)
    def ask(self, question: Question) -> None:
        try:
            handle = self.scheduler.add(question.request())
        except CapacityError:
            request = question.request()
            longest = min(len(request.ids) + question.tokens - 1, self.means.max_context)
            tiles = sum(image.tiles for image in request.images)
            assert self.policy.memory_bytes is not None
            assert cost(longest, tiles) > self.policy.memory_bytes
        else:
            self.asked.append((question, handle))

    @rule(times=st.integers(1, 30))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        _, handle = data.draw(st.sampled_from(self.asked))
        handle.cancel()
        self._step()
        assert not handle.alive
        assert handle not in self.scheduler._admission.handles()

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), kind=st.sampled_from(["raises", "no number"]))
    def spoil(self, data: st.DataObject, kind: str) -> None:
        _, handle = data.draw(st.sampled_from(self.asked))
        if handle.alive and handle.cache is not None:
            self.backend.broken[id(handle.cache)] = kind
            self.step(3)
            self.backend.broken.clear()

    def _step(self) -> None:
        try:
            self.events += self.scheduler.step()
        except (RuntimeError, PrecisionError) as error:
            self.raised.append(error)
        for handle in self.scheduler._admission.admitted:
            if handle not in self.begun:
                self.begun.append(handle)

    @invariant()
    def memory_is_never_above_the_budget(self) -> None:
        if not hasattr(self, "asked"):
            return
        admission = self.scheduler._admission
        limit = self.policy.memory_bytes
        assert limit is not None
        assert self.means.reservations.promised <= limit
        held = sum(
            handle.cache.held_bytes for handle in admission.admitted if handle.cache is not None
        )
        assert held <= self.means.reservations.promised
        assert len(admission.admitted) <= self.policy.most_running

    @invariant()
    def answers_are_those_of_each_alone_so_far(self) -> None:
        for question, handle in getattr(self, "asked", []):
            assert handle.ids == alone(question)[: len(handle.ids)]

    def teardown(self) -> None:
        if not hasattr(self, "asked"):
            return
        self._finish()
        for question, handle in self.asked:
            self._check(question, handle)
        assert self.means.reservations.promised == 0
        failed = {id(handle.error) for _, handle in self.asked if handle.error is not None}
        assert failed == set(map(id, self.raised))
        self._check_order()
        if self.lane is not None:
            until(lambda lane=self.lane: not lane._queue)  # what was given up goes after its pass
            self.lane.close()

    def _finish(self) -> None:
        """Nobody waits for ever: a prompt is at most so many steps, dropped at most so often."""
        for _ in range(200 + 3_000 * len(self.asked)):
            if not any(handle.alive for _, handle in self.asked):
                break
            self._step()
        while self.scheduler._events or self.scheduler._errors:
            self._step()

    def _check(self, question: Question, handle: Handle) -> None:
        assert not handle.alive
        told = [event for event in self.events if event.request is handle.request]
        tokens = [event.token for event in told if event.token is not None]
        assert tokens == handle.ids
        if handle.error is not None:
            return
        assert handle.reply is not None
        assert [event.finish for event in told[:-1]] == [None] * (len(told) - 1)
        assert told[-1].finish == handle.reply.finish_reason
        assert "".join(event.piece for event in told).strip() == handle.reply.text
        if handle.reply.finish_reason != "cancelled":
            assert handle.ids == alone(question)

    def _check_order(self) -> None:
        """Of one priority, nobody begins before those that came earlier."""
        places = {handle: place for place, (_, handle) in enumerate(self.asked)}
        for priority in (-1, 0, 1):
            began = [places[one] for one in self.begun if one.request.priority == priority]
            assert began == sorted(began)


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Requests, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


def test_some_sequences_of_events() -> None:
    run(40, 15)


@pytest.mark.slow(seconds=120)
def test_many_sequences_of_events() -> None:
    run(600, 40)


def several(memory: int, tokens: Sequence[int], **policy: Any) -> tuple[Scheduler, list[Handle]]:
    """A scheduler with requests for so many tokens each."""
    told = Policy(memory_bytes=memory, **policy)
    scheduler = Scheduler(answering(CountedBackend(spec(), 8), told, 0))
    asked = [Question(0, number, (), count, None) for number, count in enumerate(tokens)]
    return scheduler, [scheduler.add(question.request()) for question in asked]


def test_the_newest_is_dropped_and_its_answer_stays() -> None:
    """Both begin; the memory is enough for one to the end."""
    scheduler, (first, second) = several(120 * POSITION_BYTES, [100, 100], ahead=8)
    dropped = 0
    while first.alive or second.alive:
        had = second.cache is not None
        scheduler.step()
        dropped += had and second.cache is None and second.alive
        assert first.cache is not None or not first.alive
    assert dropped == 1
    for number, handle in enumerate((first, second)):
        assert handle.ids == alone(Question(0, number, (), 100, None))


def test_a_larger_priority_begins_first_until_others_are_old() -> None:
    for aging, wanted in ((1e9, [0, 2, 1]), (1e-9, [0, 1, 2])):
        means = answering(CountedBackend(spec()), Policy(1, aging_s=aging), 0)
        scheduler = Scheduler(means)
        asked = [Question(0, number, (), 3, None, number) for number in range(3)]
        handles = [scheduler.add(question.request()) for question in asked]
        order: list[int] = []
        while any(handle.alive for handle in handles):
            for event in scheduler.step():
                if event.finish is not None:
                    order.append([handle.request for handle in handles].index(event.request))
        assert order == wanted


def test_nobody_waits_for_memory_that_another_thread_holds() -> None:
    """A scheduler in which nothing is under way would wait for ever: it says what is missing."""
    means = answering(CountedBackend(spec()), Policy(memory_bytes=100 * POSITION_BYTES), 0)
    first, other = Scheduler(means), Scheduler(means)
    short, long = Question(0, 1, (), 30, None), Question(0, 2, (), 80, None)
    running, waiting = (first.add(question.request()) for question in (short, long))
    other.add(Question(0, 3, (), 60, None).request())
    with pytest.raises(CapacityError, match="requests under way take"):
        finish(first)
    assert running.ids == alone(short)
    assert waiting.error is not None
    with pytest.raises(CapacityError, match="requests under way take"):
        first.add(long.request())
    finish(other)
    again = first.add(long.request())
    finish(first)
    assert again.ids == alone(long)


def finish(scheduler: Scheduler) -> None:
    while scheduler.load:
        scheduler.step()
