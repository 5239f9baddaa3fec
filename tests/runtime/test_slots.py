"""Slots of caches: none is lost or given twice, whatever comes in between."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from campaign.interrupts import Moments
from host_driver import HostDriver
from side_by_side import load

from internvl_edge.runtime.backends.slots import Storage, Storages


class Room(Storage):
    """A storage without memory."""

    def __init__(self, slots: int) -> None:
        self._slots, self.free, self.ends = slots, set(range(slots)), [0] * slots

    @property
    def slots(self) -> int:
        return self._slots


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupt_loses_no_slot(bindings: HostDriver, golden_bundle: Path) -> None:
    new = load(golden_bundle).engine.backend.new_cache
    for at in range(1, 300):
        made: list[Any] = []
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            made += [new(8)]
        made.clear()
        del bindings.current[1:]  # a context that is left is the thread's affair
        made += [new(8) for _ in range(4)]
        places = [(cache.slot.storage.slots, cache.slot.index) for cache in made]
        assert places == [(3, 0), (3, 1), (3, 2), (1, 0)]
        if counted.seen < at:
            break
    assert 10 < at < 299


def test_a_slot_may_be_given_back_while_another_is_taken() -> None:
    """Which frees a storage that nobody is in."""
    for at in range(1, 300):
        storages = Storages(Room, 2)
        kept, gone, more = [[storages.take()] for _ in range(3)]
        with Moments(at, gone.clear) as counted:
            slots = [*kept, *more, storages.take()]
        assert len({(id(slot.storage), slot.index) for slot in slots}) == 3
        if counted.seen < at:
            break
    assert 10 < at < 299
