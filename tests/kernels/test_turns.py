"""Passes over tokens and operators of pictures take turns, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from internvl_edge.kernels.build import BuildError, operator_library
from internvl_edge.kernels.operators.turns import Turns

PATIENCE_S = 20


@pytest.fixture(scope="module")
def turns() -> Turns:
    try:
        return Turns(operator_library())
    except BuildError as error:
        pytest.skip(f"no compiler: {error}")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Tower:
    """A pass over tiles: operators that rest, and between two of them work that does not.

    Attributes:
        done: operators so far.
        over: set when no more should come.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns, self.done, self.over = turns, 0, threading.Event()
        self.began = threading.Event()

    def run(self) -> None:
        with self._turns.tiles():
            while not self.over.is_set():
                self._turns.rest()
                self.done += 1
                self.began.set()


def test_alone_nobody_waits(turns: Turns) -> None:
    turns.rest()
    assert turns.enter(0.0) is None
    turns.leave()
    with turns.tiles():
        turns.rest()
    turns.leave()  # one too many, as after an interrupt
    turns.rest()


def test_operators_rest_through_a_pass(turns: Turns, pool: ThreadPoolExecutor) -> None:
    tower = Tower(turns)
    running = pool.submit(tower.run)
    assert tower.began.wait(PATIENCE_S)
    for _ in range(50):
        assert turns.enter(0.0) is not None
        before = tower.done
        pool.submit(lambda: None).result()  # others get on
        assert tower.done == before
        turns.leave()
    tower.over.set()
    running.result(PATIENCE_S)


def test_a_picture_gets_on_between_any_two_passes(turns: Turns, pool: ThreadPoolExecutor) -> None:
    """However short their share is."""
    tower = Tower(turns)
    running = pool.submit(tower.run)
    assert tower.began.wait(PATIENCE_S)
    turns.enter(0.0)
    for _ in range(50):
        before = tower.done
        turns.leave()
        turns.enter(0.0)
        assert tower.done > before
    turns.leave()
    tower.over.set()
    running.result(PATIENCE_S)


def test_passes_of_several_leave_a_picture_its_turn(turns: Turns, pool: ThreadPoolExecutor) -> None:
    """Two that begin before the other has ended would otherwise be one pass without an end."""
    tower = Tower(turns)
    running = pool.submit(tower.run)
    assert tower.began.wait(PATIENCE_S)

    def pass_often() -> None:
        for _ in range(50):
            turns.enter(0.0)
            turns.leave()

    before = tower.done
    for one in [pool.submit(pass_often) for _ in range(2)]:
        one.result(PATIENCE_S)
    assert tower.done - before >= 50
    tower.over.set()
    running.result(PATIENCE_S)


def test_a_share_ends_with_the_picture(turns: Turns, pool: ThreadPoolExecutor) -> None:
    tower = Tower(turns)
    running = pool.submit(tower.run)
    assert tower.began.wait(PATIENCE_S)
    tower.over.set()
    running.result(PATIENCE_S)
    assert turns.enter(float("inf")) is None  # there is nobody to share with
    turns.leave()


@pytest.mark.slow(seconds=3)
def test_a_pass_that_an_interrupt_left_is_forgotten(turns: Turns, pool: ThreadPoolExecutor) -> None:
    turns.enter(0.0)
    tower = Tower(turns)
    running = pool.submit(tower.run)
    assert tower.began.wait(PATIENCE_S)
    tower.over.set()
    running.result(PATIENCE_S)
    turns.leave()  # late
    turns.rest()
