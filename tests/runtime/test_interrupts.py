"""A turn that is interrupted anywhere leaves a chat that answers as a fresh one; see `campaign`."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import interrupts, sweeps
from campaign.interrupts import Moments
from host_driver import HostDriver
from numpy.typing import NDArray

from internvl_edge.bundle.rope import rope_base, rope_rows
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends.cuda_passes import Binding, LogitsOutput, Place, StagedInput
from internvl_edge.runtime.backends.rope_table import CacheRope, RopeTable
from internvl_edge.runtime.devices import Device

QUESTION = "What is written here, line by line?"


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def interrupt() -> None:
    raise KeyboardInterrupt


def leave_contexts(bindings: HostDriver) -> None:
    """A context that an interrupt left on the stack is the thread's affair, not the answers'."""
    gc.collect()  # of some, the end is under way
    del bindings.current[1:]


def test_a_slice_of_the_campaign(golden_bundle: Path) -> None:
    def load(reuse: int) -> InternVL:
        return InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=reuse)

    totals = interrupts.run(load, 2026, lambda number: number < 6)
    assert totals.faults == []
    assert totals.tried == totals.right + totals.refused > 100
    assert totals.refused < totals.tried // 20


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_slice_of_it_on_a_device(
    bindings: HostDriver, golden_bundle: Path, sequences: int
) -> None:
    """What was queued before the interrupt is done before memory is written or freed."""

    def load(reuse: int) -> InternVL:
        given = {"threads": 1, "reuse_bytes": reuse, "max_sequences": sequences}
        return InternVL.load(golden_bundle, device="cuda", **given)

    totals = interrupts.run(load, 7, lambda number: number < 3, each=6)
    leave_contexts(bindings)
    assert totals.faults == []
    assert totals.tried == totals.right + totals.refused > 40


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_moments_that_are_spread_over_a_turn(
    bindings: HostDriver, golden_bundle: Path, device: Device
) -> None:
    def load(reuse: int) -> InternVL:
        return InternVL.load(golden_bundle, device=device, threads=1, reuse_bytes=reuse)

    totals = sweeps.run(load, every=151)
    leave_contexts(bindings)
    assert totals.faults == []
    assert totals.tried == totals.right > 100


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, 1])
def test_an_interrupt_at_any_moment_of_the_end_of_a_turn(golden_model: InternVL, turn: int) -> None:
    """The turn is in the history with its images, or neither is."""
    for at in range(1, 500):
        chat = golden_model.chat(max_tiles=1)
        for number in range(turn):
            chat.send(QUESTION, [picture(number)], max_new_tokens=1)
        stream = chat.stream(QUESTION, [picture(5)], max_new_tokens=3)
        next(stream, None)
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            stream.close()
        reply = chat.send("And?", max_new_tokens=2)
        assert len(chat.history) == turn + 2
        images = [*map(picture, range(turn)), picture(5)]
        tiled = [golden_model.tile_with_identity(image, 1) for image in images]
        told: list[tuple[str, str | None]] = [*chat.history[:-1], (chat.history[-1][0], None)]
        ids = golden_model.encode_conversation(told, tiled, None)
        fresh = golden_model.generate(ids, images, max_tiles=1, max_new_tokens=2)
        assert reply.token_ids == fresh.token_ids
        if counted.seen < at:
            break
    assert 10 < at < 499


def test_rotary_rows_are_known_only_when_they_are_right(golden_model: InternVL) -> None:
    """Of both kinds of filling, on the host and where they are copied to."""
    spec = golden_model.spec.language
    steps = [(0, 20, 30), (20, 21, 900), (21, 22, 901), (22, 300, 40), (300, 301, 800)]
    for at in range(1, 300):
        table = RopeTable(spec, 600, "float64")
        copied = np.zeros_like(table.cos)

        def copy(rows: slice, table: RopeTable = table, target: Any = copied) -> None:
            target[rows] = table.cos[rows]

        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            for start, total, length in steps:
                table.prepare(start, total, rope_base(spec, length), copy)
        for start, total, length in (steps[3], steps[1], steps[4], steps[0]):
            base = rope_base(spec, length)
            table.prepare(start, total, base, copy)
            cos, sin = rope_rows(spec, base, start, total)
            np.testing.assert_array_equal(table.cos[start:total], cos)
            np.testing.assert_array_equal(table.sin[start:total], sin)
            np.testing.assert_array_equal(copied[start:total], cos)
        if counted.seen < at:
            break
    assert 20 < at < 299


def test_caches_share_the_trained_table_and_nothing_else(golden_model: InternVL) -> None:
    spec = golden_model.spec.language
    shared = RopeTable(spec, 100, "float32")
    one, other = (CacheRope(shared, spec, capacity) for capacity in (40, 100))
    long = CacheRope(shared, spec, 101)
    cos, _ = one.tables(0, 40, spec.rope_theta)
    assert cos.shape == (40, spec.head_dim // 2)
    assert np.shares_memory(cos, other.tables(0, 90, spec.rope_theta)[0])
    assert not np.shares_memory(cos, long.tables(0, 90, spec.rope_theta)[0])
    stretched = rope_base(spec, 900)
    assert not np.shares_memory(one.tables(3, 4, stretched)[0], other.tables(3, 4, stretched)[0])
    np.testing.assert_allclose(cos, rope_rows(spec, spec.rope_theta, 0, 40)[0], atol=1e-7)
    np.testing.assert_allclose(
        one.tables(3, 4, stretched)[0][3:4], rope_rows(spec, stretched, 3, 4)[0], atol=1e-7
    )


class Memory:
    """Hands out memory of the host as a device's, and notes what ONNX Runtime is told."""

    device = 0

    def __init__(self) -> None:
        self.held: dict[int, NDArray[Any]] = {}
        self.bound: dict[str, NDArray[Any]] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return Array(self, np.zeros(shape, dtype))

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def upload(self, source: NDArray[Any], target: Any) -> None:
        target.values[:] = source

    def io_binding(self) -> Memory:
        return self

    def bind_input(
        self, name: str, memory: str, device: int, kind: type, shape: Any, address: int
    ) -> None:
        self.bound[name] = self.held[address][: shape[0]]

    bind_output = bind_input


class Array:
    """Some rows of a block of memory; a block goes with its array."""

    def __init__(self, memory: Memory, values: NDArray[Any]) -> None:
        self.memory, self.values, self.address = memory, values, values.ctypes.data
        self.shape, self.dtype = values.shape, values.dtype
        memory.held.setdefault(self.address, values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Array:
        return Array(self.memory, self.values[rows])


@pytest.mark.parametrize("then", [2, 3, 9])
def test_what_is_bound_is_what_was_written(then: int) -> None:
    """Also where memory grew, or was being bound, when an interrupt came."""
    for at in range(1, 300):
        memory: Any = Memory()
        binding = Binding(Place(memory, "host"), memory)
        staged, logits = StagedInput(memory, "rows", np.float32), LogitsOutput(memory, 2, 5)
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            for rows in (2, 9, 3):
                staged.write(binding, np.full((rows, 4), rows, np.float32))
                logits.bind(binding, rows)
        staged.write(binding, np.full((then, 4), -1, np.float32))
        logits.bind(binding, then)
        np.testing.assert_array_equal(memory.bound["rows"], np.full((then, 4), -1))
        found: Any = logits.device
        assert memory.bound["logits"].shape == (then, 5)
        assert np.shares_memory(memory.bound["logits"], found.values)
        if counted.seen < at:
            break
    assert 5 < at < 299
