"""Integer products of a vision tower on every path that runs here: NumPy's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from vision_cases import IntegerCase, drawn, integer_case, integer_cases, rounding

from internvl_edge.kernels import build
from internvl_edge.kernels.vision.library import Rounding, VisionLibrary


@pytest.fixture(scope="module")
def library() -> VisionLibrary:
    try:
        return VisionLibrary(build.operator_library())
    except build.BuildError as reason:
        pytest.skip(f"no C++ compiler here: {reason}")


def multiply(
    library: VisionLibrary, case: IntegerCase, path: str, gelu: Rounding | None = None
) -> NDArray[Any]:
    return library.multiply_integers(
        *(case.x, case.weight, case.scales, case.bias),
        **{"scale": case.scale, "zero": case.zero, "path": path, "gelu": gelu},
    )


def check(library: VisionLibrary, case: IntegerCase, paths: list[str] | None = None) -> None:
    wanted = case.wanted()
    for path in paths or library.paths:
        np.testing.assert_array_equal(multiply(library, case, path), wanted, path)


@settings(max_examples=150)
@given(case=integer_cases())
def test_any_shape_and_bytes(library: VisionLibrary, case: IntegerCase) -> None:
    check(library, case)


@pytest.mark.parametrize("kind", ["random", "ends"])
@pytest.mark.parametrize("seed", range(5))
def test_more_inputs_than_are_transposed_at_a_time(
    library: VisionLibrary, kind: str, seed: int
) -> None:
    """One and two more than whole spans of fours and of pairs; every zero point."""
    for inputs in (1023, 1024, 1026, 2048, 2050, 4099):
        check(library, integer_case(14, inputs, 35, kind, seed))


def test_more_rows_than_go_through_the_weights_at_once(library: VisionLibrary) -> None:
    for rows in (767, 768, 769, 1600):
        check(library, integer_case(rows, 37, 40, "ends", rows))


def test_sums_that_wait_for_more_inputs(library: VisionLibrary) -> None:
    """So many inputs of so many rows do not go through the weights at once."""
    for seed in range(3):
        check(library, integer_case(700, 3101, 37, "ends", seed))


def test_a_towers_products(library: VisionLibrary) -> None:
    """Of InternViT-6B's longest sums, at the ends of what bytes hold."""
    case = integer_case(3, 12_800, 64, "ends", 1)
    check(library, case)
    bias = np.full(64, np.iinfo(np.int32).max, np.int32)
    check(library, IntegerCase(case.x, case.weight, case.scales, bias, 0.03, 0))


@pytest.mark.parametrize("seed", range(1, 8))
def test_gelu_of_products_is_what_both_give_apart(library: VisionLibrary, seed: int) -> None:
    case = integer_case(17, 300, 37, "random", seed)
    scales = np.abs(drawn((37,), "random", seed)) / np.float32(3000)
    bias = None if case.bias is None else (case.bias >> 16)
    case = IntegerCase(case.x, case.weight, scales, bias, 0.03, 128)
    how = rounding(37, seed) or Rounding(0.01, 77)
    for path in library.paths:
        floats = multiply(library, case, path)
        assert 0.1 < floats.std() < 30
        got = multiply(library, case, path, how)
        np.testing.assert_array_equal(got, library.gelu(floats, path=path, rounding=how), path)
