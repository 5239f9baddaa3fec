"""Attention over caches on every path that runs here: NumPy's, whatever else is in the pass."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import DTYPES, HEADS, SIZES, Case, case, cases, check
from hypothesis import given, settings

from internvl_edge.kernels import build
from internvl_edge.kernels.attention.library import AttentionLibrary


@pytest.fixture(scope="module")
def library() -> AttentionLibrary:
    try:
        return AttentionLibrary(build.operator_library())
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")


def attend(library: AttentionLibrary, before: Case, path: str) -> tuple[np.ndarray, Case]:
    after = before.copy()
    return library.attend(after.rows, after.sequences, path=path), after


@settings(max_examples=100, deadline=None)
@given(drawn=cases())
def test_every_path_attends_as_numpy(library: AttentionLibrary, drawn: Case) -> None:
    for path in library.paths:
        got, after = attend(library, drawn, path)
        check(got, after, drawn)


@settings(max_examples=40, deadline=None)
@given(drawn=cases())
def test_a_sequence_is_the_same_bits_alone(library: AttentionLibrary, drawn: Case) -> None:
    for path in library.paths:
        together, after = attend(library, drawn, path)
        first = 0
        for i, one in enumerate(drawn.sequences):
            alone, own = attend(library, drawn.alone(i), path)
            np.testing.assert_array_equal(alone, together[first : first + one.rows])
            np.testing.assert_array_equal(own.sequences[0].keys, after.sequences[i].keys)
            first += one.rows


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head", SIZES)
def test_every_kind_of_head(
    library: AttentionLibrary, head: int, heads: tuple[int, int], dtypes: tuple[str, str]
) -> None:
    given = case([(70, 1, 3), (0, 33, 1), (1500, 2, 0)], heads, head, dtypes)
    for path in library.paths:
        got, after = attend(library, given, path)
        check(got, after, given)
