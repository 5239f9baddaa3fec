"""Products of weights in blocks, random and extreme, and whether results are NumPy's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.kernels.blocks import reference
from internvl_edge.kernels.blocks.library import BLOCKS

#: `ive::blocks::kFewRows`: each path adds the blocks of so few in an order of its own.
FEW_ROWS = 4
#: By bits: of integers that float32 sums without rounding, 8 * 127 or 128 * 127 times as many.
EXACT_INPUTS = {4: 2**24 // (8 * 127), 8: 2**24 // (128 * 127)}
BITS = tuple(EXACT_INPUTS)


@dataclass(frozen=True)
class Case:
    """The arguments of a product; see `BlockLibrary.multiply`."""

    x: NDArray[np.float32]
    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    bits: int = 4

    @property
    def block(self) -> int:
        return self.values.shape[2] * 8 // self.bits


def case(
    rows: int,
    inputs: int,
    columns: int,
    block: int,
    kind: str = "random",
    seed: int = 0,
    bits: int = 4,
) -> Case:
    """Return a product of one of `KINDS`, with a bias or without: of random values, of the largest
    there are, the smallest or both, of more orders of magnitude than a scale spans, half zero."""
    random = np.random.default_rng(seed)
    blocks = -(-inputs // block)
    x = random.standard_normal((rows, inputs)).astype(np.float32)
    values = random.integers(0, 256, (columns, blocks, block * bits // 8), np.uint8)
    if kind in ("largest", "smallest"):
        x[:] = 1 if kind == "largest" else -1
        values[:] = 0xFF if random.integers(2) else 0
    if kind == "mixed":
        x = np.sign(x)
        extremes = (0xF0, 0x0F) if bits == 4 else (0xFF, 0)
        values = np.where(values & 1, *extremes).astype(np.uint8)
    if kind == "wide":
        x *= np.exp(random.uniform(-80, 80, x.shape)).astype(np.float32)
    if kind == "zero":
        x[:, : inputs // 2] = 0
    scales = random.random((columns, blocks), np.float32)
    bias = random.standard_normal(columns).astype(np.float32) if random.integers(2) else None
    return Case(x, values, scales, bias, bits)


KINDS = ("random", "largest", "smallest", "mixed", "wide", "zero")


@st.composite
def cases(draw: st.DrawFn, most_rows: int = 50, most_columns: int = 150) -> Case:
    """Draw a product; inputs need not fill their last block."""
    block, bits = draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(BITS))
    return case(
        rows=draw(st.integers(1, most_rows)),
        inputs=draw(st.integers(1, min(9 * block, EXACT_INPUTS[bits] // block * block))),
        columns=draw(st.integers(1, most_columns)),
        block=block,
        kind=draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 2**32)),
        bits=bits,
    )


def integers(given: Case) -> tuple[Case, NDArray[np.float32]]:
    """Return a product all of whose scales are one, and its result, which are integers."""
    rounded, _ = reference.round_inputs(given.x, given.block)
    rounded[:, :, 0] = 127  # so that rounding leaves them as they are
    x = rounded.reshape(len(rounded), -1)
    sums = reference.integer_sums(rounded, given.values, given.bits).sum(axis=-1)
    assert x.shape[1] <= EXACT_INPUTS[given.bits]
    ones = np.ones_like(given.scales)
    whole = Case(x.astype(np.float32), given.values, ones, bits=given.bits)
    return whole, sums.astype(np.float32)


def check(results: list[NDArray[np.float32]], given: Case) -> None:
    """Check the results of all paths, the plain one last: near the float64 sum, and of more than
    a few rows the same bits."""
    for y in results:
        assert error(y, given) < 1e-6
        if len(y) > FEW_ROWS:
            np.testing.assert_array_equal(y, results[-1])


def error(got: NDArray[np.float32], given: Case) -> float:
    """Return the largest difference from the float64 sum over the same integers, as a share of the
    magnitudes of all that is added."""
    arrays = given.x, given.values, given.scales, given.bias
    wanted = reference.multiply(*arrays, bits=given.bits)
    rounded, scales = reference.round_inputs(given.x, given.block)
    weight = np.abs(reference.integer_weights(given.values, given.bits))
    size = np.einsum(
        "mbk,nbk->mn",
        np.abs(rounded) * scales[..., np.newaxis],
        weight * given.scales[..., np.newaxis],
    )
    size += 0 if given.bias is None else np.abs(given.bias)
    return float((np.abs(got - wanted) / np.maximum(size, 1e-30)).max())
