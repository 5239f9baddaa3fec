"""Every system goes on from a prompt with one sequence or several, and gives the same logits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import small_config, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.bench.peers.engines import ENGINES, Engine
from internvl_edge.bench.peers.gguf_writer import write_gguf
from internvl_edge.bench.peers.llama_checkpoint import write_llama
from internvl_edge.bench.peers.openvino_writer import Groups, Packing, write_openvino
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.sequence import TokenSequence

PROMPT, STEPS, SEQUENCES = 40, 5, 3
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}
#: Of each engine the package it needs, how its file is written, and the least cosine of logits.
FILES: dict[str, tuple[str, Callable[[Checkpoint, Path], Path], float]] = {
    "internvl-edge": ("numpy", lambda source, path: export_bundle(source, path), 0.999999),
    "llama.cpp": ("llama_cpp", lambda source, path: write_gguf(source, path), 0.9999),
    "openvino": (
        "openvino",
        lambda source, path: write_openvino(source, path.with_suffix(".xml"), Packing(16, 16)),
        0.999,
    ),
    "transformers": ("torch", lambda source, path: write_llama(source, path), 0.999),
}


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = small_config(heads=4, kv_heads=2, hidden=128)
    del config["llm_config"]["bias"]
    config["llm_config"] |= KINDS[request.param]
    return Checkpoint(write_checkpoint(tmp_path_factory.mktemp("peer") / "checkpoint", config))


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 450, PROMPT + STEPS)


@pytest.fixture(scope="module")
def expected(
    source: Checkpoint, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> NDArray[np.float32]:
    """Logits behind the prompt and behind each later token, by this runtime in float32."""
    bundle = export_bundle(source, tmp_path_factory.mktemp("own") / "bundle")
    model = InternVL.load(bundle, device="cpu", threads=1)
    sequence = TokenSequence.build(ids.tolist(), model.context_id, [])
    return model.engine.logits(sequence)[PROMPT - 1 :]


@pytest.mark.parametrize("name", FILES)
def test_sequences(
    name: str,
    source: Checkpoint,
    ids: NDArray[np.int64],
    expected: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    """One, several, and one again: each time from the prompt on."""
    package, write, least = FILES[name]
    if find_spec(package) is None or (name == "llama.cpp" and find_spec("gguf") is None):
        pytest.skip(f"{package} is not installed")
    path = write(source, tmp_path / "model")
    engine = ENGINES[name](path, 1, PROMPT + STEPS, SEQUENCES)
    assert engine.features
    assert cosine(engine.prefill(ids[:PROMPT]), expected[0]) > least
    alone = steps(engine, ids, 1)
    assert cosine(alone[:, 0], expected[1:]) > least
    together = steps(engine, ids, SEQUENCES)
    assert together.shape == (STEPS, SEQUENCES, expected.shape[1])
    for sequence in range(SEQUENCES):
        assert cosine(together[:, sequence], expected[1:]) > least
    np.testing.assert_allclose(steps(engine, ids, 1), alone, atol=1e-5)


def steps(engine: Engine, ids: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Logits `(steps, sequences, vocab)` of the same tokens in each sequence."""
    engine.fork(count)
    return np.stack([engine.decode(np.repeat(token, count)) for token in ids[PROMPT:]])


def test_sequences_are_apart(source: Checkpoint, tmp_path: Path) -> None:
    """What one is given is not seen by another."""
    engine = ENGINES["internvl-edge"](export_bundle(source, tmp_path / "own"), 1, 16, 2)
    engine.prefill(np.arange(3, 11))
    engine.fork(2)
    engine.decode(np.array([20, 30]))
    (_, after_30) = engine.decode(np.array([21, 21]))
    engine.fork(1)
    engine.decode(np.array([30]))
    np.testing.assert_allclose(engine.decode(np.array([21]))[0], after_30, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.sampled_from([1, 3, 128]))
def test_groups_are_rounded_to_nearest(seed: int, bits: int, group: int) -> None:
    """No value is farther than half a step from what is stored, but for the float16 scale."""
    weight = np.random.default_rng(seed).standard_normal((4, 2 * group), np.float32)
    packed = Groups.rounded(weight, bits, group)
    assert packed.values.max() < 2**bits
    scales = packed.scales.astype(np.float32)
    values = (packed.values.astype(np.float32) - packed.zeros) * scales
    # The largest value is a whole range of steps away, each of which float16 rounds by 1/2048.
    slack = 0.5 + 2**bits / 2048
    assert np.all(np.abs(values - weight.reshape(values.shape)) <= slack * scales + 1e-6)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
