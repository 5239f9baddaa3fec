"""Candidates found on a device, with the stand-in for the driver: as many as decide, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_driver import HostDriver
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from internvl_edge.kernels import cuda as kernels
from internvl_edge.kernels.cuda import SELECT_MOST, CudaKernels
from internvl_edge.kernels.device import DeviceArray, Driver
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.decoding.device_sampling import LargestLogits
from internvl_edge.runtime.decoding.sampling import Candidates, Sampler, Sampling


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cuda:
    binary = tmp_path / "binary"
    binary.write_text(kernels.SELECT_SOURCE)
    monkeypatch.setattr(kernels, "cuda_binary", lambda source: binary)
    driver = Driver(HostDriver())
    monkeypatch.setattr(Driver, "open", lambda failure: driver)
    return Cuda.open()


def found(cuda: Cuda, logits: Any, count: int) -> Candidates | None:
    with cuda.active():
        largest = LargestLogits(cuda, CudaKernels(cuda.driver), len(logits))
        largest.queue(DeviceArray.of(cuda.driver, np.asarray(logits, np.float32)))
        if not largest.fetch(count):
            return None
        cuda.synchronize()
        return largest.fetched(count)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(vocab=3, seed=0, levels=0, count=5)
@example(vocab=64, seed=0, levels=1, count=64)
@example(vocab=65, seed=0, levels=1, count=2)
@example(vocab=3000, seed=0, levels=0, count=64)
@given(
    vocab=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([0, 1, 7, 100, 1000]),
    count=st.integers(1, SELECT_MOST),
)
def test_all_that_decide_or_none(
    cuda: Cuda, vocab: int, seed: int, levels: int, count: int
) -> None:
    """The largest and the equals of the last; None only where more than 64 are no smaller."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, vocab) if levels else rng.standard_normal(vocab)
    logits = values.astype(np.float32)
    got = found(cuda, logits, count)
    if count == 1:
        assert got is not None
        assert got.ids is not None
        assert got.ids.tolist() == [logits.argmax()]
        return
    decide = np.flatnonzero(logits >= np.sort(logits)[-min(count, vocab)])
    if got is None:
        assert len(decide) >= SELECT_MOST
        return
    assert got.ids is not None
    assert set(decide) <= set(got.ids)
    assert all(np.diff(got.ids) > 0)
    np.testing.assert_array_equal(got.logits, logits[got.ids])


@pytest.mark.parametrize("count", [0, SELECT_MOST + 1])
def test_more_than_the_kernel_keeps(cuda: Cuda, count: int) -> None:
    assert found(cuda, np.arange(100), count) is None


@settings(max_examples=150, deadline=None)
@given(
    vocab=st.integers(2, 300),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(1, 20),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    levels=st.sampled_from([0, 3]),
)
def test_the_same_seed_draws_the_same_tokens(
    vocab: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    levels: int,
) -> None:
    """From the candidates as from all the logits; ties included."""
    rng = np.random.default_rng(seed)
    sampling = Sampling(temperature, top_k, top_p, min_p, seed=seed)
    whole, part = Sampler(sampling), Sampler(sampling)
    for _ in range(5):
        values = rng.integers(0, levels, vocab) if levels else rng.standard_normal(vocab)
        logits = values.astype(np.float32)
        kth = np.sort(logits)[-min(sampling.candidates, vocab)]
        ids = np.flatnonzero(logits >= kth)
        assert part(Candidates(logits[ids], ids)) == whole(Candidates(logits))
