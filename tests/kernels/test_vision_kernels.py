"""A vision tower's operations on every path that runs here: as defined, the same bits on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from vision_cases import (
    KINDS,
    AttentionCase,
    NormCase,
    assert_same,
    attention_case,
    attention_cases,
    drawn,
    gelu,
    norm_case,
    norm_cases,
    rounded,
    rounding,
)

from internvl_edge.kernels import build
from internvl_edge.kernels.vision.library import Rounding, VisionLibrary

#: Of values as large as one: float32 sums in sixteen lanes; queries and keys of 12 bits.
NORM_ERROR, GELU_ERROR, ATTENTION_ERROR = 2e-6, 5e-7, 5e-3


@pytest.fixture(scope="module")
def library() -> VisionLibrary:
    try:
        return VisionLibrary(build.operator_library())
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")


def on_all(library: VisionLibrary, run: Callable[..., NDArray[Any]]) -> NDArray[Any]:
    """Return what every path gives."""
    results = [run(path=path) for path in library.paths]
    assert len(results) > 1
    assert_same(results)
    return results[0]


def norm(library: VisionLibrary, case: NormCase, how: Rounding | None) -> NDArray[Any]:
    def run(path: str) -> NDArray[Any]:
        normed, total = library.norm(
            *(case.x, case.weight, case.bias),
            **{"epsilon": case.epsilon, "centred": case.centred, "path": path},
            **{"added": case.added, "rounding": how},
        )
        if case.added is not None:
            np.testing.assert_array_equal(total, case.x + case.added)
        return normed

    return on_all(library, run)


def attend(library: VisionLibrary, case: AttentionCase, how: Rounding | None) -> NDArray[Any]:
    return on_all(
        library,
        lambda path: library.attend(
            *(case.query, case.key, case.value),
            **{"heads": case.heads, "norms": case.norms, "rounding": how, "path": path},
        ),
    )


def check_norm(library: VisionLibrary, case: NormCase) -> None:
    floats, wanted = norm(library, case, None), case.wanted()
    added = 0 if case.added is None else np.abs(case.added).max()
    size = np.sqrt((case.x.astype(np.float64) ** 2).mean() + case.epsilon)
    spread = (np.abs(case.x).max() + added) / size
    assert np.abs(floats - wanted).max() <= NORM_ERROR * max(1.0, np.abs(wanted).max(), spread)
    if case.rounding is not None:
        got = norm(library, case, case.rounding)
        np.testing.assert_array_equal(got, rounded(floats, case.rounding))


def check_attention(library: VisionLibrary, case: AttentionCase) -> None:
    floats, wanted = attend(library, case, None), case.wanted()
    assert np.abs(floats - wanted).max() <= ATTENTION_ERROR * max(1e-30, np.abs(case.value).max())
    if case.rounding is not None:
        got = attend(library, case, case.rounding)
        columns = floats.reshape(-1, floats.shape[-1])
        np.testing.assert_array_equal(got.reshape(columns.shape), rounded(columns, case.rounding))


@settings(max_examples=100)
@given(case=norm_cases())
def test_norms(library: VisionLibrary, case: NormCase) -> None:
    if np.abs(case.x).max() < 1e4:
        check_norm(library, case)
    else:
        norm(library, case, case.rounding)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 1024, 3200])
def test_norms_of_a_towers_width(library: VisionLibrary, width: int) -> None:
    for seed in range(12):
        check_norm(library, norm_case(3, width, seed=seed))


@settings(max_examples=100)
@given(case=attention_cases())
def test_attention(library: VisionLibrary, case: AttentionCase) -> None:
    largest = max(np.abs(case.query).max(), np.abs(case.key).max())
    if largest < 5 or (case.norms is not None and case.query.shape[-1] > 8):
        check_attention(library, case)
    else:  # scores as large as their rounding: one token or another is chosen
        attend(library, case, case.rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_share_a_scale(library: VisionLibrary, kind: str) -> None:
    for seed in range(4):
        case = attention_case(1, 521, 2, 32, kind, seed)
        attend(library, case, case.rounding)
    check_attention(library, attention_case(1, 521, 2, 64))


@pytest.mark.parametrize("size", [128, 512])
def test_the_largest_products_fit_their_sums(library: VisionLibrary, size: int) -> None:
    """All rounded to the largest numbers there are, of the same sign: every share is alike."""
    ones = np.ones((1, 300, size), np.float32)
    case = AttentionCase(ones, ones, -ones, 1, None, None)
    np.testing.assert_allclose(attend(library, case, None), -ones, rtol=1e-6)
    case = AttentionCase(ones, -ones, ones, 1, None, None)
    np.testing.assert_allclose(attend(library, case, None), ones, rtol=1e-6)


def test_a_share_of_almost_nothing_is_kept(library: VisionLibrary) -> None:
    """A single token that all attend to, with the others' values large and their shares small."""
    query = np.full((1, 64, 16), 2, np.float32)
    key = -query
    key[0, 7] = 2
    value = drawn((1, 64, 16), "random", 0)
    check_attention(library, AttentionCase(query, key, value, 1, None, None))


def test_gelu(library: VisionLibrary) -> None:
    x = np.linspace(-12, 12, 20_003, dtype=np.float32).reshape(1, -1)
    got = on_all(library, lambda path: library.gelu(x, path=path))
    np.testing.assert_allclose(got, gelu(x), rtol=0, atol=GELU_ERROR)
    far = np.array([[-1e30, -88, -0.0, 0, 88, 1e30]], np.float32)
    got = on_all(library, lambda path: library.gelu(far, path=path))
    np.testing.assert_allclose(got, np.maximum(far, 0), rtol=0, atol=1e-37)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gelu_rounds_as_quantize_linear(library: VisionLibrary, seed: int) -> None:
    x, how = drawn((4, 37), "random", seed), rounding(37, seed)
    assert how is not None
    floats = on_all(library, lambda path: library.gelu(x, path=path))
    got = on_all(library, lambda path: library.gelu(x, path=path, rounding=how))
    np.testing.assert_array_equal(got, rounded(floats, how))


def test_halves_round_to_even_and_ends_are_kept(library: VisionLibrary) -> None:
    x = np.array([[10.5, 11.5, 126.5, 127.5, 1e30, 10.5, 1e30]], np.float32)  # their own GELU
    signs = np.array([1, 1, 1, 1, 1, -1, -1], np.float32)
    how = Rounding(1.0, 128, signs)
    got = on_all(library, lambda path: library.gelu(x, path=path, rounding=how))
    assert got.tolist() == [[138, 140, 254, 255, 255, 118, 0]]


@pytest.mark.parametrize(
    ("rows", "inputs", "columns"), [(1, 1, 1), (13, 588, 70), (25, 300, 33), (3, 17, 160)]
)
def test_float_products(library: VisionLibrary, rows: int, inputs: int, columns: int) -> None:
    x, weight = drawn((rows, inputs), "random", 1), drawn((columns, inputs), "random", 2)
    for bias in (None, drawn((columns,), "random", 3)):
        got = on_all(library, lambda path, b=bias: library.multiply(x, weight, b, path=path))
        wanted = x.astype(np.float64) @ weight.T + (0 if bias is None else bias)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * inputs)


def test_what_is_not_finite_stays_in_its_head(library: VisionLibrary) -> None:
    """A query's in its row; a key's and a value's reach every row, as they do by definition."""
    for name, rows in (("query", slice(3, 4)), ("key", slice(None)), ("value", slice(None))):
        for wrong in (np.nan, np.inf):
            case = attention_case(1, 20, 2, 16)
            getattr(case, name)[0, 3, 5] = wrong
            got = attend(library, case, None)
            assert np.isnan(got[0, rows, :16]).all()
            got[0, rows, :16] = 0
            assert np.isfinite(got).all()
