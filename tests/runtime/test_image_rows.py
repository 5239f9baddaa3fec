"""Rows of many images reach their slots, whatever pass the slots fall into."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.runtime.decoding.sequence import EncodedImage, ImageRows, TokenSequence

SLOT = 7


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=6),
    st.integers(0, 60),
    st.integers(1, 25),
)
def test_rows_reach_their_slots(layout: list[tuple[int, int]], start: int, size: int) -> None:
    """`layout`: text tokens, then rows of an image; run from `start` in passes of `size`."""
    ids, images = [], []
    for text, rows in layout:
        ids += [1] * text + [SLOT] * rows
        first = sum(map(len, images))
        numbers = np.arange(first, first + rows, dtype=np.float32)
        images.append(
            EncodedImage(np.repeat(numbers[:, None], 3, axis=1), signatures=np.full(rows, -1))
        )
    sequence = TokenSequence.build(ids, SLOT, images)
    expected = np.full((len(ids), 3), -1, np.float32)
    expected[np.equal(ids, SLOT)] = np.concatenate([np.empty((0, 3)), *(i.rows for i in images)])
    rest = sequence.image_rows(start)
    for begin in range(start, len(ids), size):
        got = np.full((min(size, len(ids) - begin), 3), -1, np.float32)
        rest.put(got, begin)
        np.testing.assert_array_equal(got, expected[begin : begin + size])


def test_nothing_to_put() -> None:
    target = np.ones((4, 3), np.float32)
    ImageRows(np.empty(0, np.int64), []).put(target, 2)
    np.testing.assert_array_equal(target, 1)
