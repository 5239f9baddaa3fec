"""Attention over caches on every path that runs here: NumPy's, whatever else is in the pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_cases import DTYPES, HEADS, SIZES, Case, case, cases, check
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.kernels import build
from internvl_edge.kernels.attention.library import AttentionLibrary, CachedSequence, Rows


@pytest.fixture(scope="module")
def library() -> AttentionLibrary:
    try:
        return AttentionLibrary(build.operator_library())
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")


def attend(library: AttentionLibrary, before: Case, path: str) -> tuple[np.ndarray, Case]:
    after = before.copy()
    return library.attend(after.rows, after.sequences, path=path), after


@pytest.mark.slow(seconds=2)
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


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_sequence(
    library: AttentionLibrary, part: str, wrong: float
) -> None:
    before = case([(9, 2, 1), (0, 20, 0), (200, 1, 0)])
    for path in library.paths:
        wanted, _ = attend(library, before, path)
        given = before.copy()
        changed = getattr(given.rows, part).copy()
        changed[12, 1] = wrong
        rows = replace(given.rows, **{part: changed})
        got = library.attend(rows, given.sequences, path=path)
        assert not np.isfinite(got[12]).all()
        others = [0, 1, 22]
        np.testing.assert_array_equal(got[others], wanted[others])


def test_scores_far_apart_keep_their_order(library: AttentionLibrary) -> None:
    """The largest takes all the weight, whichever block it is in."""
    given = case([(700, 1, 0)], (1, 1), 64, rotates=False)
    for far in (0, 5, 127, 128, 400, 699):
        keys = np.zeros_like(given.sequences[0].keys)
        keys[0, far] = 1e4 * given.rows.query[0, 0]
        one = replace(given.sequences[0], keys=keys)
        for path in library.paths:
            got = library.attend(given.rows, [one], path=path)
            np.testing.assert_array_equal(got[0, 0], one.values[0, far])


@pytest.mark.parametrize(
    "places", [[(3, 0, 1)], [(3, 2, -1)], [(-1, 2, 5)], [(0, 1, 0), (2, 0, 0)]], ids=str
)
def test_sequences_that_do_not_fit_are_refused(
    library: AttentionLibrary, places: list[tuple[int, int, int]]
) -> None:
    rows = sum(max(rows, 0) for _, rows, _ in places)
    given = case([(0, rows or 1, 0)], (2, 1), 8)
    sequences = [
        CachedSequence(*(np.zeros((1, max(n + m + free, 1), 8), np.float32) for _ in "kv"), n, m)
        for n, m, free in places
    ]
    for path in library.paths:
        with pytest.raises(ValueError, match="are not those of"):
            library.attend(given.rows, sequences, path=path)


@given(st.lists(st.floats(width=32), min_size=8, max_size=8))
def test_any_float_is_halved_as_numpy_halves(
    library: AttentionLibrary, values: list[float]
) -> None:
    """What is alone in its cache comes back as its value, in half precision."""
    with np.errstate(over="ignore"):
        value = np.array(values, np.float32).astype(np.float16).reshape(1, 1, 8)
    zero = np.zeros((1, 1, 8), np.float16)
    for path in library.paths:
        cache = CachedSequence(zero.copy(), zero.copy(), 0, 1)
        got = library.attend(Rows(zero, zero, value), [cache], path=path)
        np.testing.assert_array_equal(got, value)
        np.testing.assert_array_equal(cache.values[0], value[0])
