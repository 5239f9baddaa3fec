"""The selection's kernels against NumPy's sort: block by block on the CPU, same bodies."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver, open_driver
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.kernels import cuda, ops
from internvl_edge.kernels.device import DeviceArray
from internvl_edge.kernels.jobs import TYPES, LaunchShape, SelectJob

VOCAB = 92_553  # InternLM2's
#: What is easily got wrong: signed zeros, infinities, NaN of both signs, subnormals, the extremes.
AWKWARD = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 6e-8, -6e-8, 65504.0, -65504.0)
DTYPES = ("float32", "float16")
Library = Any


@pytest.fixture(scope="module")
def library() -> Library:
    loaded = ops.cpu_kernels()
    if loaded is None:
        pytest.skip("no C++ compiler here")
    loaded.ive_cpu_select_shape.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.ive_cpu_select_shape.restype = None
    return loaded


def launch(library: Library, given: NDArray[Any], count: int) -> NDArray[np.uint64]:
    """What one launch of `select.cu` leaves."""
    out = np.full(cuda.select_shape(len(given)).x * count, 2**64 - 1, np.uint64)
    addresses = given.ctypes.data, out.ctypes.data
    job = SelectJob(*addresses, len(given), count, TYPES[given.dtype.name])
    assert library.ive_cpu_select_blocks(ctypes.byref(job)) == 0
    return out


def select(
    library: Library, logits: NDArray[Any], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices and logits of the largest, launch after launch as in `CudaKernels.select`."""
    found = launch(library, logits, count)
    for kept in cuda.select_levels(len(logits), count)[1:]:
        found = launch(library, found, count)
        assert len(found) == kept
    return cuda.read_candidates(found)


def expected(logits: NDArray[Any], count: int) -> NDArray[np.int64]:
    """NaN first, then the largest; of equals the one that comes first."""
    nan = np.isnan(logits)
    values = np.where(nan, 0, logits.astype(np.float64))
    return np.lexsort((np.arange(len(logits)), -values, ~nan))[:count]


@settings(max_examples=150, deadline=None)
@example(size=VOCAB, seed=0, dtype="float32", levels=0, awkward=[], count=64)
@example(size=VOCAB, seed=1, dtype="float16", levels=3, awkward=[np.nan, np.nan], count=64)
@example(size=VOCAB, seed=2, dtype="float16", levels=0, awkward=[], count=1)
@example(size=64, seed=3, dtype="float32", levels=0, awkward=[], count=64)
@given(
    size=st.integers(1, 600) | st.integers(1, 100_000),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([0, 1, 2, 7]),
    awkward=st.lists(st.sampled_from(AWKWARD), max_size=6),
    count=st.integers(1, cuda.SELECT_MOST),
)
def test_the_blocks_choose_as_numpy_does(
    library: Library,
    size: int,
    seed: int,
    dtype: str,
    levels: int,
    awkward: list[float],
    count: int,
) -> None:
    """Normal logits or, with `levels`, many ties; and awkward ones anywhere."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, size) if levels else rng.standard_normal(size)
    logits = values.astype(dtype)
    logits[rng.integers(0, size, len(awkward))] = awkward
    ids, found = select(library, logits, count)
    np.testing.assert_array_equal(ids, expected(logits, count))
    assert ids[0] == logits.argmax()
    np.testing.assert_array_equal(found, logits[ids].astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", AWKWARD)
@pytest.mark.parametrize("second", AWKWARD)
def test_every_pair_in_both_orders(
    library: Library, dtype: str, first: float, second: float
) -> None:
    """Compared in one block, by neighbours or last of all, and in a later launch."""
    for size, at in ((2, 1), (1024, 512), (1024, 1023), (VOCAB, VOCAB - 1)):
        logits = np.full(size, -np.inf, dtype)
        logits[0], logits[at] = first, second
        np.testing.assert_array_equal(select(library, logits, 2)[0], expected(logits, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_is_found_wherever_it_is(library: Library, dtype: str) -> None:
    logits = np.zeros(3 * 1024 + 77, dtype)
    for at in (*range(0, len(logits), 59), len(logits) - 1):
        logits[at] = 1
        assert select(library, logits, 1)[0] == [at]
        logits[at] = 0


def test_every_half_precision_number_is_in_order(library: Library) -> None:
    """All that are not NaN, 64 at a time."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = np.random.default_rng(0).permutation(every[~np.isnan(every)])
    ordered = numbers[expected(numbers, len(numbers))]
    for start in range(0, len(ordered), 64 * 40):
        left = numbers[numbers <= ordered[start]]
        ids, found = select(library, left, 64)
        np.testing.assert_array_equal(ids, expected(left, 64))
        np.testing.assert_array_equal(found, left[ids].astype(np.float32))


@pytest.mark.parametrize(
    "job",
    [SelectJob(None, None, 0, 1, 1), SelectJob(None, None, 1, 65, 1), SelectJob(None, None, 1, 1)],
    ids=["no logits", "too many", "of bytes"],
)
def test_a_job_that_cannot_be_is_refused(library: Library, job: SelectJob) -> None:
    bad_argument = 2
    assert library.ive_cpu_select_blocks(ctypes.byref(job)) == bad_argument


@given(size=st.integers(1, 2**31 - 1))
def test_python_launches_what_cpp_launches(library: Library, size: int) -> None:
    job, shape = SelectJob(size=size), LaunchShape()
    library.ive_cpu_select_shape(ctypes.byref(job), ctypes.byref(shape))
    expected = cuda.select_shape(size)
    assert (shape.x, shape.threads) == (expected.x, expected.threads)


@given(size=st.integers(1, 2**31 - 1), count=st.integers(1, cuda.SELECT_MOST))
def test_launches_end_with_one_run(size: int, count: int) -> None:
    levels = cuda.select_levels(size, count)
    assert levels[-1] == count
    for before, after in zip([size, *levels], levels, strict=False):
        assert after == -(-before // cuda.SELECT_RUN) * count


# The calls, with the stand-in for the driver.


@pytest.fixture
def kernels(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> tuple[cuda.CudaKernels, HostDriver]:
    binary = tmp_path / "binary"
    binary.write_text(cuda.SELECT_SOURCE)
    monkeypatch.setattr(cuda, "cuda_binary", lambda source: binary)
    driver, bindings = open_driver()
    return cuda.CudaKernels(driver), bindings


def outputs(kernels: cuda.CudaKernels, size: int, count: int = 64) -> dict[str, DeviceArray]:
    scratch = (cuda.select_scratch(size, count),)
    return {
        "out": DeviceArray(kernels.driver, (count,), "uint64"),
        "scratch": DeviceArray(kernels.driver, scratch, "uint64"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_launches_and_no_memory(
    kernels: tuple[cuda.CudaKernels, HostDriver], dtype: str
) -> None:
    cuda_kernels, bindings = kernels
    logits = np.random.default_rng(5).standard_normal(VOCAB).astype(dtype)
    source, given = DeviceArray.of(cuda_kernels.driver, logits), outputs(cuda_kernels, VOCAB)
    bindings.calls.clear()
    assert cuda_kernels.select(source, stream=7, **given) is given["out"]
    ids, _ = cuda.read_candidates(given["out"].to_host())
    np.testing.assert_array_equal(ids, expected(logits, 64))
    names = [call[0] for call in bindings.named("cuLaunchKernel")]
    assert names == [f"ive_select_{cuda.SHORT[dtype]}", "ive_select_u64", "ive_select_u64"]
    shapes = [call[1:7] for call in bindings.named("cuLaunchKernel")]
    assert shapes == [(blocks, 1, 1, 512, 1, 1) for blocks in (91, 6, 1)]
    assert {call[8] for call in bindings.named("cuLaunchKernel")} == {7}
    assert bindings.named("cuMemAlloc", "cuStreamSynchronize") == []


def test_fewer_logits_than_asked_for(kernels: tuple[cuda.CudaKernels, HostDriver]) -> None:
    cuda_kernels, _ = kernels
    source = DeviceArray.of(cuda_kernels.driver, np.array([1, 3, 2], np.float32))
    out = cuda_kernels.select(source, **outputs(cuda_kernels, 3))
    ids, logits = cuda.read_candidates(out.to_host())
    assert (ids.tolist(), logits.tolist()) == ([1, 2, 0], [3, 2, 1])


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (np.zeros((1, 4), np.float32), ValueError, r"one row \(n,\)"),
        (np.zeros(0, np.float32), ValueError, "1 <= n"),
        (np.zeros(4, np.float64), TypeError, "float32 or float16, not float64"),
    ],
)
def test_wrong_logits(
    kernels: tuple[cuda.CudaKernels, HostDriver],
    logits: NDArray[Any],
    error: type[Exception],
    message: str,
) -> None:
    cuda_kernels, bindings = kernels
    source = DeviceArray.of(cuda_kernels.driver, logits)
    with pytest.raises(error, match=message):
        cuda_kernels.select(source, **outputs(cuda_kernels, 4))
    assert bindings.named("cuLaunchKernel") == []


def test_wrong_outputs(kernels: tuple[cuda.CudaKernels, HostDriver]) -> None:
    cuda_kernels, bindings = kernels
    logits = DeviceArray.of(cuda_kernels.driver, np.zeros(2000, np.float32))
    given = outputs(cuda_kernels, 2000)
    short, floats = given["out"][:3], DeviceArray(cuda_kernels.driver, (64,), "float32")
    with pytest.raises(ValueError, match=r"expected uint64 \(128,\)"):
        cuda_kernels.select(logits, **(given | {"scratch": short}))
    with pytest.raises(ValueError, match=r"expected uint64 \(64,\)"):
        cuda_kernels.select(logits, **(given | {"out": floats}))
    for out in (given["out"][:0], DeviceArray(cuda_kernels.driver, (65,), "uint64")):
        with pytest.raises(ValueError, match="1 to 64"):
            cuda_kernels.select(logits, **(given | {"out": out}))
    assert bindings.named("cuLaunchKernel") == []
