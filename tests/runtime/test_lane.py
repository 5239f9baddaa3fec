"""The vision lane: whose picture is encoded first, and whose turn it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
from many import finishes
from numpy.typing import NDArray

from internvl_edge.bundle.extras import example_room
from internvl_edge.runtime import InternVL, Policy
from internvl_edge.runtime.decoding.encoding import ImageEncoder
from internvl_edge.runtime.decoding.lane import Beside, VisionLane, Waiter
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.decoding.reuse import ImageStore
from internvl_edge.runtime.decoding.scheduler import Scheduler
from internvl_edge.runtime.decoding.shelf import Shelf
from internvl_edge.runtime.images.identity import PendingImage


class Tower:
    """Encodes one tile at a time, once it may.

    Attributes:
        may: set when passes may go on.
        seen: the grey of each tile, in the order of the passes.
    """

    tiles_at_once = 1
    turns = None

    def __init__(self) -> None:
        self.may, self.seen = threading.Event(), list[int]()

    def encode_tiles(self, tiles: Any) -> NDArray[np.float32]:
        self.seen.append(int(tiles[0, 0, 0, 0]))
        assert self.may.wait(20)
        return np.zeros((1, 8), np.float32)


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        # Priority, and how many seconds ago it was asked.
        ([(0, 0), (0, 0), (0, 0)], [0, 1, 2]),
        ([(0, 0), (0, 0), (1, 0)], [0, 2, 1]),
        ([(0, 0), (0, 30), (1, 0)], [0, 1, 2]),
        ([(0, 0), (0, 0), (0, 30)], [0, 2, 1]),
    ],
    ids=["as they came", "by priority", "by age, of a lower one", "by age"],
)
def test_whose_picture_is_first(
    golden_model: InternVL, asked: list[tuple[int, int]], order: list[int]
) -> None:
    """The first is under way when the others come."""
    tower: Any = Tower()
    encoder = ImageEncoder(tower, ImageStore(Shelf(0)), golden_model.answering.finite)
    lane = VisionLane(encoder, Policy(aging_s=10))
    now, side = time.perf_counter(), golden_model.spec.vision.tile_size
    encodings = []
    for grey, (priority, age) in enumerate(asked):
        request = Request([5], (2,), started=now - age, priority=priority)
        image = golden_model.inputs.tiles(np.full((1, side, side, 3), grey, np.uint8))
        encodings.append(lane.ask(image, Waiter(request, lambda: None))[0])
        while not tower.seen:
            time.sleep(0.001)
    tower.may.set()
    while not all(encoding.ended for encoding in encodings):
        time.sleep(0.001)
    lane.close()
    assert tower.seen == order


class Handed:
    """Holds what a lane's thread would do."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], object]] = []

    def submit(self, job: Callable[[], object]) -> None:
        self.jobs.append(job)


def test_a_prompt_may_be_collected_in_the_midst_of_anything(
    golden_model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the lane does where it is asked, and in its thread: all of it here, in one thread."""
    side = golden_model.spec.vision.tile_size
    first, then = (
        golden_model.inputs.tiles(np.full((1, side, side, 3), grey, np.uint8)) for grey in (3, 4)
    )

    def encode(at: int) -> Moments:
        tower: Any = Tower()
        tower.may.set()
        encoder = ImageEncoder(tower, ImageStore(Shelf(0)), golden_model.answering.finite)
        lane, handed = VisionLane(encoder, Policy()), Handed()
        monkeypatch.setattr(lane, "_thread", handed)
        beside = Beside(lane, lambda: None)
        prompts = [beside.encode(Request([5], ()), [PendingImage(first, 1)])]
        assert next(prompts[0]) is False
        with Moments(at, prompts.clear) as counted:
            encoding, _ = lane.ask(then, Waiter(Request([5], ()), lambda: None))
            handed.jobs.pop()()
        assert not prompts or counted.seen < at
        assert encoding.rows is not None
        assert tower.seen in ([3, 4], [4])
        assert not lane._queue
        return counted

    def at_every_moment() -> None:
        for at in range(1, 900):
            seen.append(encode(at).seen)
            if seen[-1] < at:
                break

    seen: list[int] = []
    finishes(at_every_moment)
    assert 100 < seen[-1] < len(seen)


class Told:
    """Turns that write down who has them."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def tiles(self) -> Iterator[None]:
        self.told.append("tiles")
        yield
        self.told.append("tiles end")

    def enter(self, share: float) -> float:
        assert share >= 0
        self.told.append("enter")
        return 0.0

    def leave(self) -> None:
        self.told.append("leave")


@pytest.fixture
def turns(golden_model: InternVL, monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(type(golden_model.engine), "turns", told)
    return told


def request(model: InternVL, prompt: str, tokens: int, *images: Any) -> Request:
    tiled = [model.tile_with_identity(image, 1) for image in images]
    ids = model.encode_conversation([("<image>" * len(images) + prompt, None)], tiled, None)
    return Request(ids, (), tiled, max_new_tokens=tokens)


def test_answers_have_turns_and_prompts_alone_none(golden_model: InternVL, turns: Told) -> None:
    scheduler = Scheduler(golden_model.answering, golden_model.answering.lane)
    scheduler.add(request(golden_model, "Hello", 4))
    while scheduler.load:
        scheduler.step()
    assert turns.told == ["enter", "leave"] * 3  # the first token is the prompt's


def test_a_pass_over_tiles_is_told_of(golden_model: InternVL, turns: Told) -> None:
    scheduler = Scheduler(golden_model.answering, golden_model.answering.lane)
    scheduler.add(request(golden_model, "Hello", 1, np.zeros((9, 9, 3), np.uint8)))
    while scheduler.load:
        scheduler.step()
    assert turns.told == ["tiles", "tiles end"]


def test_a_step_that_fails_leaves(
    golden_model: InternVL, turns: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(golden_model.answering)
    handle = scheduler.add(request(golden_model, "Hello", 9))
    while not handle.ids:
        scheduler.step()
    monkeypatch.setattr(golden_model.engine, "run", None)  # no pass
    with pytest.raises(TypeError):
        scheduler.step()
    assert turns.told == ["enter", "leave"]


def test_rows_of_pictures_beside_answers_are_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, of an INT8 tower: its operators are run in pieces and rest."""
    model = InternVL.load(example_room() / "bundle", device="cpu", threads=2)
    if model.engine.turns is None:
        pytest.skip("no operators of ours")
    pictures = [np.random.default_rng(n).integers(0, 256, (90, 90, 3), np.uint8) for n in range(3)]
    asked: list[Any] = [{"prompt": "What is written here?", "images": [one]} for one in pictures]
    wanted = model.encode_images(pictures)
    model = InternVL.load(example_room() / "bundle", device="cpu", threads=2)
    model.generate_batch(["Hello", "What is 2 and 2?", *asked], max_new_tokens=24, ignore_eos=True)
    monkeypatch.setattr(model.engine, "encode_tiles", None)  # their rows are known
    np.testing.assert_array_equal(model.encode_images(pictures), wanted)
    model.close()
