"""Products of weights in blocks on every path that runs here: NumPy's integers, the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from block_cases import BITS, FEW_ROWS, KINDS, Case, case, cases, check, integers
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.export.formats.quantize import BlockFormat, dequantize_blocks, quantize_blocks
from internvl_edge.kernels import build
from internvl_edge.kernels.blocks import reference
from internvl_edge.kernels.blocks.library import BLOCKS, BlockLibrary


@pytest.fixture(scope="module")
def library() -> BlockLibrary:
    try:
        return BlockLibrary(build.operator_library())
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")


def results(library: BlockLibrary, given: Case) -> list[np.ndarray]:
    arrays = given.x, given.values, given.scales, given.bias
    return [library.multiply(*arrays, bits=given.bits, path=path) for path in library.paths]


@settings(max_examples=150)
@given(drawn=cases())
def test_integers_are_numpys_on_every_path(library: BlockLibrary, drawn: Case) -> None:
    whole, sums = integers(drawn)
    for y in results(library, whole):
        np.testing.assert_array_equal(y, sums)


@settings(max_examples=150)
@given(drawn=cases())
def test_floats_are_the_sum_over_these_integers(library: BlockLibrary, drawn: Case) -> None:
    check(results(library, drawn), drawn)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_number_of_rows(
    library: BlockLibrary, kind: str, block: int, bits: int
) -> None:
    for rows in (*range(1, 14), 24, 50):
        given = case(rows, 2 * block + 1, 33, block, kind, seed=rows, bits=bits)
        check(results(library, given), given)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 3, 13])
@pytest.mark.parametrize(("inputs", "columns"), [(5000, 300), (10240, 97), (1000, 1030)])
def test_more_inputs_and_columns_than_one_task_takes(
    library: BlockLibrary, rows: int, inputs: int, columns: int, bits: int
) -> None:
    given = case(rows, inputs, columns, 128, seed=1, bits=bits)
    check(results(library, given), given)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", [1, 7, 45])
def test_a_row_among_a_few_is_as_it_is_alone(
    library: BlockLibrary, columns: int, block: int, bits: int
) -> None:
    """To the last bit, which takes the same order of adding blocks."""
    given = case(FEW_ROWS, 19 * block - 1, columns, block, seed=columns, bits=bits)
    alone = [results(library, replace(given, x=given.x[row : row + 1])) for row in range(FEW_ROWS)]
    for rows in range(2, FEW_ROWS + 1):
        together = results(library, replace(given, x=given.x[:rows]))
        for path, y in enumerate(together):
            np.testing.assert_array_equal(y, [one[path][0] for one in alone[:rows]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(
    library: BlockLibrary, wrong: float, bits: int
) -> None:
    given = case(5, 96, 40, 32, bits=bits)
    wanted = reference.multiply(given.x, given.values, given.scales, given.bias, bits=bits)
    given.x[2, 50] = wrong
    for y in results(library, given):
        assert np.isnan(y[2]).all()
        np.testing.assert_allclose(np.delete(y, 2, 0), np.delete(wanted, 2, 0), atol=1e-4)


@settings(max_examples=50)
@given(
    scale=st.floats(2.0**-149, 2.0**127, width=32),
    ratios=st.lists(st.floats(-1, 1, width=32), min_size=32, max_size=32),
)
def test_any_float_is_rounded_as_numpy_rounds(
    library: BlockLibrary, scale: float, ratios: list[float]
) -> None:
    """From the smallest there is, which counts as zero, to the largest."""
    x = np.array([ratios], np.float32) * np.float32(scale)
    rounded, scales = reference.round_inputs(x, 32)
    weight = np.full((1, 1, 16), 0x88, np.uint8)
    for place in range(32):  # a weight of one at each place in turn
        weight[0, 0, place // 2] = 0x98 if place % 2 else 0x89
        (wanted,) = (rounded[0, 0, place] * scales[0, 0].astype(np.float64)).reshape(1)
        for y in results(library, Case(x, weight, np.ones((1, 1), np.float32))):
            assert y[0, 0] == np.float32(wanted)
        weight[0, 0, place // 2] = 0x88


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_means_what_export_quantised(library: BlockLibrary, bits: int) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((48, 200)).astype(np.float32)
    form = BlockFormat(bits, 64)
    blocks = quantize_blocks(weight, form)
    x = random.standard_normal((6, 200)).astype(np.float32)
    wanted = x @ dequantize_blocks(blocks, form, 200).T
    for path in library.paths:
        y = library.multiply(x, blocks.packed, blocks.scales, bits=bits, path=path)
        assert np.linalg.norm(y - wanted) / np.linalg.norm(wanted) < 0.01


def test_shapes_that_do_not_fit_are_refused(library: BlockLibrary) -> None:
    given = case(2, 64, 8, 32)
    with pytest.raises(ValueError, match="no weight of 65 inputs"):
        library.multiply(
            np.zeros((2, 65), np.float32), given.values, given.scales, bits=4, path="plain"
        )
    with pytest.raises(ValueError, match="no weight of 64 inputs"):
        library.multiply(given.x, given.values, given.scales[:, :1], bits=4, path="plain")
    bias = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"the bias is \(3,\), the weight has 8 columns"):
        library.multiply(given.x, given.values, given.scales, bias, bits=4, path="plain")
