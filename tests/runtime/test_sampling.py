"""Sampling filters against transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internvl_edge.runtime.decoding.sampling import Candidates, Sampler, Sampling, filter_logits


@settings(max_examples=150, deadline=None)
@example(vocab=8, seed=18, temperature=0.25, top_k=0, top_p=1 - 2**-53, min_p=0.0, penalty=1.0)
@given(
    vocab=st.integers(2, 50),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 2),
)
def test_filters_equal_transformers(
    vocab: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(vocab) * 3).astype(np.float32)
    generated = random.integers(0, vocab, 4).tolist()
    ids, scores = torch.tensor([generated]), torch.from_numpy(logits).double()[None]
    processors = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([MinPLogitsWarper(min_p)] if min_p > 0 else []),
    ]
    for processor in processors:
        scores = processor(ids, scores)
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    got = filter_logits(logits, generated, sampling)
    # Equal up to the last bits of a double; -inf must stand in the same places.
    np.testing.assert_allclose(got, scores[0].numpy(), rtol=1e-9)


def test_greedy_takes_the_largest() -> None:
    logits = np.array([0.1, 3.0, 2.9], np.float32)
    assert Sampler(Sampling())(Candidates(logits)) == 1


def test_repetition_penalty_applies_to_greedy() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    logits = Candidates(np.array([0.1, 3.0, 2.9], np.float32))
    assert [sampler(logits), sampler(logits)] == [1, 2]


def test_a_seed_repeats_and_frequencies_follow_the_softmax() -> None:
    logits = Candidates(np.log(np.array([0.5, 0.3, 0.2], np.float32)))
    runs = []
    for _ in range(2):
        sampler = Sampler(Sampling(temperature=1.0, seed=7))
        runs.append([sampler(logits) for _ in range(4000)])
    assert runs[0] == runs[1]
    share = np.bincount(runs[0], minlength=3) / 4000
    # Standard deviation of each share is below 0.008; four of them.
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.032)


@pytest.mark.parametrize("seeds", [(1, 2)])
def test_seeds_differ(seeds: tuple[int, int]) -> None:
    logits = Candidates(np.zeros(1000, np.float32))
    draws = [
        [Sampler(Sampling(temperature=1.0, seed=seed))(logits) for _ in range(3)] for seed in seeds
    ]
    assert draws[0] != draws[1]
