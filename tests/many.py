"""Requests to be asked together, and what is alike about their answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from internvl_edge.runtime import InternVL, Reply, Sampling

#: What never ends would be waited for so long.
LONG_S = 60.0
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


def alone(model: InternVL, asked: Any, **options: Any) -> Reply:
    own = asked if isinstance(asked, dict) else {"prompt": asked}
    return model.generate(**{**options, **own})


def same(got: list[Reply], wanted: list[Reply]) -> None:
    assert [one.token_ids for one in got] == [one.token_ids for one in wanted]
    assert [one.text for one in got] == [one.text for one in wanted]
    assert [one.finish_reason for one in got] == [one.finish_reason for one in wanted]


def spoil(model: InternVL, grey: int) -> None:
    """Rows of tiles of one grey are no numbers from now on."""
    inner = model.engine.backend.encode_tiles

    def broken(tiles: Any) -> Any:
        rows = inner(tiles)
        rows[(tiles == np.uint8(grey)).all(axis=(1, 2, 3))] = np.nan
        return rows

    model.engine.backend.encode_tiles = broken  # type: ignore[method-assign]


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


def finishes(work: Callable[[], object]) -> None:
    """Do it in a thread, which may never end where something is wrong."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LONG_S)
    assert not thread.is_alive()
