"""Experts by GPTQ: never worse than rounding to nearest, however few rows one is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_edge.export.calibration.expert_gptq import compensate_experts
from internvl_edge.export.calibration.experts import ExpertInputs
from internvl_edge.export.calibration.gptq import CHUNK, shrunk_moments
from internvl_edge.export.calibration.ranges import sqnr_db
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.quantize import (
    BlockFormat,
    Blocks,
    Floats,
    dequantize_blocks,
    quantize_blocks,
)
from internvl_edge.export.graphs.dialects import Experts

COUNT, CHOSEN, HIDDEN, WIDTH = 4, 2, 128, 64
FORM = BlockFormat(4, 32, True)
#: How loud the directions of the inputs are.
LOUDNESS = {
    "all alike": np.ones(HIDDEN),
    "fewer and fewer": 1 / np.sqrt(1 + np.arange(HIDDEN)),
    "some": np.where(np.arange(HIDDEN) < 16, 1, 0.1),
}


def drawing(kind: str, random: np.random.Generator) -> Callable[[int], Floats]:
    """Draw inputs of one kind."""
    basis = np.linalg.qr(random.standard_normal((HIDDEN, HIDDEN)))[0]

    def draw(rows: int) -> Floats:
        values = random.standard_normal((rows, HIDDEN)) * LOUDNESS[kind] @ basis
        return np.asarray(values, np.float32)

    return draw


@pytest.mark.parametrize("rows", [1, 8, 40, 200, 2000])
@pytest.mark.parametrize("kind", LOUDNESS)
def test_other_rows_lose_no_more_than_by_rounding_to_nearest(kind: str, rows: int) -> None:
    """Of rows that were not calibrated with, through the matrices that read them."""
    random = np.random.default_rng(0)
    draw = drawing(kind, random)
    router = random.standard_normal((COUNT, HIDDEN)).astype(np.float32)
    gated = random.standard_normal((COUNT * 2 * WIDTH, HIDDEN)).astype(np.float32) / 11
    down = random.standard_normal((COUNT * HIDDEN, WIDTH)).astype(np.float32) / 8
    inputs = ExpertInputs()
    inputs.experts = Experts(
        *(Weight.held(name, w) for name, w in zip("rgd", (router, gated, down), strict=True)),
        per_token=CHOSEN,
        normed=True,
    )
    x = draw(rows)
    inputs.add(x, x @ router.T)
    decided = compensate_experts(inputs, FORM)
    packed = Blocks(decided["packed:g"], decided["packed_scales:g"], None)
    assert decided["packed:d"].shape == (COUNT * HIDDEN, WIDTH // 32, 16)
    plain = quantize_blocks(gated, FORM, importance=np.ones(HIDDEN, np.float32))
    others = draw(1000)
    got, nearest = (
        sqnr(others @ gated.T, others @ dequantize_blocks(one, FORM, HIDDEN).T)
        for one in (packed, plain)
    )
    assert got > nearest - 0.35
    if kind != "all alike" and rows >= 200:
        assert got > nearest + 1


def sqnr(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return sqnr_db(float((exact**2).sum()), float(((got - exact) ** 2).sum()))


def test_moments_of_many_rows_are_their_own() -> None:
    """Of few they are drawn to the middle; of none and of one nothing is known."""
    random = np.random.default_rng(1)
    draw = drawing("fewer and fewer", random)
    true = draw(200_000)
    exact = true.T @ true / len(true)
    away = []
    for rows in (1, 20, 200, 20_000):
        (found,) = shrunk_moments(draw(rows))
        assert np.linalg.eigvalsh(found)[0] > 0
        away.append(np.linalg.norm(found - exact))
    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.05 * np.linalg.norm(exact)
    (one,) = shrunk_moments(np.eye(3, dtype=np.float32)[:1])
    np.testing.assert_allclose(one, np.eye(3) / 3, rtol=1e-6)
    (none,) = shrunk_moments(np.empty((0, 3), np.float32))
    np.testing.assert_array_equal(none, np.zeros((3, 3)))
    (zeros,) = shrunk_moments(np.zeros((5, 3), np.float32))
    np.testing.assert_array_equal(zeros, np.zeros((3, 3)))
    assert [len(part) for part in shrunk_moments(np.ones((2, CHUNK + 7), np.float32))] == [CHUNK, 7]


def test_the_share_is_ledoits_and_wolfs() -> None:
    """By their formulas, one row's moments after another."""
    x = drawing("some", np.random.default_rng(2))(30).astype(np.float64)
    mean = sum(np.outer(row, row) for row in x) / len(x)
    identity = np.eye(HIDDEN)
    mu = np.sum(mean * identity) / HIDDEN
    d2 = np.sum((mean - mu * identity) ** 2) / HIDDEN
    b2 = sum(np.sum((np.outer(row, row) - mean) ** 2) / HIDDEN for row in x) / len(x) ** 2
    expected = min(b2, d2) / d2 * mu * identity + (d2 - min(b2, d2)) / d2 * mean
    (found,) = shrunk_moments(x.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * mu)
