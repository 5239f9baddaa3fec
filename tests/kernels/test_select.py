"""The greedy choice's kernels against numpy.argmax: block by block on the CPU, same bodies."""

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


def select(library: Library, logits: NDArray[Any]) -> int:
    """What `select.cu` does without its launches; the scratch memory is as dirty as on a device."""
    best = np.full(cuda.SELECT_MOST_BLOCKS, 2**64 - 1, np.uint64)
    chosen = np.full(1, -1, np.int32)
    addresses = (array.ctypes.data for array in (logits, best, chosen))
    job = SelectJob(*addresses, len(logits), TYPES[logits.dtype.name])
    assert library.ive_cpu_select_blocks(ctypes.byref(job)) == 0
    return int(chosen[0])


@settings(max_examples=150, deadline=None)
@example(size=VOCAB, seed=0, dtype="float32", levels=0, awkward=[])
@example(size=VOCAB, seed=1, dtype="float16", levels=3, awkward=[np.nan, np.nan])
@given(
    size=st.integers(1, 600) | st.integers(1, 100_000),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([0, 1, 2, 7]),
    awkward=st.lists(st.sampled_from(AWKWARD), max_size=6),
)
def test_the_blocks_choose_as_numpy_does(
    library: Library, size: int, seed: int, dtype: str, levels: int, awkward: list[float]
) -> None:
    """Normal logits or, with `levels`, many ties; and awkward ones anywhere."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, size) if levels else rng.standard_normal(size)
    logits = values.astype(dtype)
    logits[rng.integers(0, size, len(awkward))] = awkward
    assert select(library, logits) == logits.argmax()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", AWKWARD)
@pytest.mark.parametrize("second", AWKWARD)
def test_every_pair_in_both_orders(
    library: Library, dtype: str, first: float, second: float
) -> None:
    """In one thread, one warp, two warps, two blocks."""
    for size, at in ((2, 1), (40, 31), (256, 200), (70_000, 69_999), (VOCAB, VOCAB - 1)):
        logits = np.full(size, -np.inf, dtype)
        logits[0], logits[at] = first, second
        assert select(library, logits) == logits.argmax()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_is_found_wherever_it_is(library: Library, dtype: str) -> None:
    logits = np.zeros(2 * 128 * 256 + 77, dtype)
    for at in (*range(0, len(logits), 509), len(logits) - 1):
        logits[at] = 1
        assert select(library, logits) == at
        logits[at] = 0


def test_every_half_precision_number_is_in_order(library: Library) -> None:
    """All of them at once, and all that are not NaN: the largest is what NumPy says."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert select(library, every) == every.argmax()
    numbers = np.random.default_rng(0).permutation(every[~np.isnan(every)])
    for _ in range(50):
        assert select(library, numbers) == numbers.argmax()
        numbers = numbers[numbers < numbers.max()]


@given(size=st.integers(1, 2**31 - 1))
def test_python_launches_what_cpp_launches(library: Library, size: int) -> None:
    job, shape = SelectJob(size=size), LaunchShape()
    library.ive_cpu_select_shape(ctypes.byref(job), ctypes.byref(shape))
    expected = cuda.select_shape(size)
    assert (shape.x, shape.threads) == (expected.x, expected.threads)
    assert 1 <= shape.x <= cuda.SELECT_MOST_BLOCKS


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


def outputs(kernels: cuda.CudaKernels) -> dict[str, DeviceArray]:
    return {
        "out": DeviceArray(kernels.driver, (1,), "int32"),
        "best": DeviceArray(kernels.driver, (cuda.SELECT_MOST_BLOCKS,), "uint64"),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_launches_and_no_memory(
    kernels: tuple[cuda.CudaKernels, HostDriver], dtype: str
) -> None:
    cuda_kernels, bindings = kernels
    logits = np.random.default_rng(5).standard_normal(VOCAB).astype(dtype)
    source, given = DeviceArray.of(cuda_kernels.driver, logits), outputs(cuda_kernels)
    bindings.calls.clear()
    assert cuda_kernels.argmax(source, stream=7, **given) is given["out"]
    assert given["out"].to_host() == logits.argmax()
    names = [call[0] for call in bindings.named("cuLaunchKernel")]
    assert names == [f"ive_select_{cuda.SHORT[dtype]}", "ive_select_id"]
    shapes = [call[1:7] for call in bindings.named("cuLaunchKernel")]
    assert shapes == [(128, 1, 1, 256, 1, 1), (1, 1, 1, 256, 1, 1)]
    assert {call[8] for call in bindings.named("cuLaunchKernel")} == {7}
    assert bindings.named("cuMemAlloc", "cuStreamSynchronize") == []


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
        cuda_kernels.argmax(source, **outputs(cuda_kernels))
    assert bindings.named("cuLaunchKernel") == []


def test_wrong_outputs(kernels: tuple[cuda.CudaKernels, HostDriver]) -> None:
    cuda_kernels, _ = kernels
    logits = DeviceArray.of(cuda_kernels.driver, np.zeros(4, np.float32))
    short = DeviceArray(cuda_kernels.driver, (3,), "uint64")
    with pytest.raises(ValueError, match=r"expected uint64 \(128,\)"):
        cuda_kernels.argmax(logits, **(outputs(cuda_kernels) | {"best": short}))
    with pytest.raises(ValueError, match=r"expected int32 \(1,\)"):
        cuda_kernels.argmax(logits, **(outputs(cuda_kernels) | {"out": short}))
