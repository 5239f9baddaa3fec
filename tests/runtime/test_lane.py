"""The vision lane: whose picture is encoded first."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL, Policy
from internvl_edge.runtime.decoding.encoding import ImageEncoder
from internvl_edge.runtime.decoding.lane import VisionLane, Waiter
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.decoding.reuse import ImageStore
from internvl_edge.runtime.decoding.shelf import Shelf


class Tower:
    """Encodes one tile at a time, once it may.

    Attributes:
        may: set when passes may go on.
        seen: the grey of each tile, in the order of the passes.
    """

    tiles_at_once = 1

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
