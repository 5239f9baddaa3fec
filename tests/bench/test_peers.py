"""Peers get the same model: converted weights give this runtime's logits, or transformers'."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import small_config, write_checkpoint
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from internvl_edge.bench.peers.answers import llamacpp_models
from internvl_edge.bench.peers.gguf_writer import write_gguf
from internvl_edge.bench.peers.layout import interleaved_rows
from internvl_edge.bench.peers.llama_checkpoint import write_llama
from internvl_edge.bench.peers.llamacpp import LlamaCpp, quantize_gguf
from internvl_edge.bench.peers.rounds import decode_rate, prefill_rate
from internvl_edge.bench.peers.systems import PEERS, choose_peers, language_parameters, obstacle
from internvl_edge.bench.peers.worker import Round, Worker, versions
from internvl_edge.bundle.errors import BundleError, DeviceError, LimitError
from internvl_edge.bundle.extras import example_room
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.sequence import TokenSequence

pytestmark = pytest.mark.slow(seconds=1)

needs_llama = pytest.mark.skipif(
    find_spec("llama_cpp") is None or find_spec("gguf") is None,
    reason="llama-cpp-python and gguf are not installed",
)
TOKENS = 200


def random_checkpoint(folder: Path) -> Path:
    """Grouped heads and biases, so that every reordered row matters."""
    config = small_config(heads=4, kv_heads=2)
    config["llm_config"]["bias"] = True
    return write_checkpoint(folder, config)


#: Decoders of other kinds.
QWEN: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}


def qwen_checkpoint(folder: Path, kind: str) -> Path:
    config = small_config(heads=4, kv_heads=2)
    del config["llm_config"]["bias"]
    config["llm_config"] |= QWEN[kind]
    return write_checkpoint(folder, config)


@pytest.fixture(scope="module", params=["tiny_ocr", "random", *QWEN])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny_ocr":
        return example_room() / "checkpoint"
    if request.param in QWEN:
        return qwen_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint", request.param)
    return random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 450, TOKENS)


@pytest.fixture(scope="module")
def own_logits(
    checkpoint: Path, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> NDArray[np.float32]:
    """float32 `(tokens, vocab)`."""
    bundle = export_bundle(checkpoint, tmp_path_factory.mktemp("own") / "bundle")
    model = InternVL.load(bundle, device="cpu", threads=1)
    return model.engine.logits(TokenSequence.build(ids.tolist(), model.context_id, []))


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_llama_checkpoint_gives_our_logits(
    checkpoint: Path, ids: NDArray[np.int64], own_logits: NDArray[np.float32], tmp_path: Path
) -> None:
    directory = write_llama(Checkpoint(checkpoint), tmp_path / "llama")
    auto = AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    # The same weights (both checkpoints are bfloat16) in float32 on both sides.
    assert np.abs(logits - own_logits).max() < 1e-3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"rope_type": "yarn", "rope_frequencies": (1.0,) * 8},
            "a rotary embedding of the type yarn",
        ),
        ({"qk_norm": True, "bias": True}, "normed heads and biases"),
    ],
)
def test_decoders_that_peers_are_not_given(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = Checkpoint(example_room() / "checkpoint")
    source.spec = replace(source.spec, language=replace(source.spec.language, **changed))
    for write in (write_llama, write_gguf):
        with pytest.raises(LimitError, match=said):
            write(source, tmp_path / "peer")
    assert not list(tmp_path.iterdir())


@needs_llama
@pytest.mark.parametrize(("dtype", "agreement"), [("float32", 0.99), ("float16", 0.98)])
def test_gguf_gives_our_logits(
    checkpoint: Path,
    ids: NDArray[np.int64],
    own_logits: NDArray[np.float32],
    tmp_path: Path,
    dtype: str,
    agreement: float,
) -> None:
    """Its KV cache is float16: 0.02 off at most where logits reach 19 (tiny_ocr, 700 tokens)."""
    path = write_gguf(Checkpoint(checkpoint), tmp_path / "model.gguf", dtype)
    model = LlamaCpp(path, 1, TOKENS)
    logits = model.append_ids(ids, every=True)
    assert cosine(logits, own_logits) > 0.9999
    assert (logits.argmax(1) == own_logits.argmax(1)).mean() >= agreement
    # One token at a time, after going back: what decoding and a second turn do.
    model.truncate(TOKENS - 3)
    steps = [model.append_ids(token[np.newaxis])[0] for token in ids[-3:]]
    assert cosine(np.stack(steps), own_logits[-3:]) > 0.999
    model.close()


@needs_llama
def test_quantised_gguf(ids: NDArray[np.int64], tmp_path: Path) -> None:
    source = Checkpoint(example_room() / "checkpoint")
    whole = write_gguf(source, tmp_path / "whole.gguf")
    exact = LlamaCpp(whole, 1, TOKENS).append_ids(ids, every=True)
    sizes, closeness = [whole.stat().st_size], [1.0]
    for kind in ("Q8_0", "Q4_K_M", "Q4_0"):
        path = quantize_gguf(whole, tmp_path / f"{kind}.gguf", kind, 1)
        sizes.append(path.stat().st_size)
        closeness.append(cosine(LlamaCpp(path, 1, TOKENS).append_ids(ids, every=True), exact))
    assert sizes == sorted(sizes, reverse=True)
    assert closeness == sorted(closeness, reverse=True)
    assert closeness[1] > 0.999
    with pytest.raises(BundleError, match="could not quantise"):
        quantize_gguf(tmp_path / "none.gguf", tmp_path / "never.gguf", "Q4_0", 1)
    assert not (tmp_path / "never.gguf").exists()
    with pytest.raises(BundleError, match="does not take"):
        LlamaCpp(tmp_path / "none.gguf", 1, TOKENS)


@needs_llama
def test_llama_reads_the_receipt(tmp_path: Path) -> None:
    """Our vision rows through llama.cpp's decoder, two turns; its cache follows ours."""
    room = example_room()
    (loaded,) = llamacpp_models(room / "checkpoint", tmp_path, ["fp32 + llama.cpp Q8_0"], 1)
    own = InternVL.load(tmp_path / "llama.cpp", device="cpu", threads=1)
    chats = [model.chat() for model in (loaded.model, own)]
    for question, images in (("What is the total?", [room / "receipt.png"]), ("And the date?", [])):
        answers = {chat.send(question, images, max_new_tokens=32).text for chat in chats}
        assert len(answers) == 1
        assert answers != {""}


def test_rows_are_interleaved() -> None:
    assert interleaved_rows(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_ratios_are_taken_turn_by_turn() -> None:
    """A machine that slows down in one round slows both, and the ratio stays."""
    own = [Round(100, slow, {1: (slow / 10,), 8: (slow / 5,)}) for slow in (1, 4, 1)]
    peer = [Round(100, 2 * slow, {1: (slow * 0.3,), 8: (slow * 2,)}) for slow in (1, 4, 1)]
    prefill = prefill_rate(own, peer)
    assert prefill.ratio == pytest.approx(2)
    assert (prefill.own, prefill.peer) == (100, 50)
    alone, together = (decode_rate(own, peer, count) for count in (1, 8))
    assert alone.ratio == pytest.approx(3)
    assert together.ratio == pytest.approx(10)
    assert (together.own, together.peer) == pytest.approx((40, 4))


def test_choice() -> None:
    assert choose_peers([]) == list(PEERS)
    assert [peer.form for peer in choose_peers(["LLAMA"])] == ["Q4_0", "Q4_K_M", "Q8_0"]
    assert len(choose_peers(["transformers bf16"])) == 1
    assert len(choose_peers(["transformers", "transformers bf16"])) == 2
    with pytest.raises(LimitError, match="--peer 'ollama' is unknown"):
        choose_peers(["ollama"])


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Checkpoint(example_room() / "checkpoint").spec
    parameters = language_parameters(spec)
    (optimum,) = choose_peers(["optimum"])
    assert "optimum-onnx, onnxruntime not installed: pip" in (
        obstacle(optimum, parameters, {}) or ""
    )
    installed = dict.fromkeys(optimum.packages, "1")
    assert obstacle(optimum, parameters, installed) is None
    monkeypatch.setattr("internvl_edge.bench.peers.systems.available_memory", lambda: 1 << 20)
    assert "of memory" in (obstacle(optimum, parameters, installed) or "")
    # Table and head 512 x 256; four layers of 8 heads, 2 for keys and values; nine norms.
    layer = 256 * (256 + 2 * 64) + 256 * 256 + 3 * 256 * 512
    assert parameters == 2 * 512 * 256 + 4 * layer + 9 * 256


def test_worker_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="internvl-edge: BundleError"):
        Worker("internvl-edge", tmp_path / "none", [1, 16, 1])
    with pytest.raises(DeviceError, match="does not run this package"):
        versions(["numpy"], "/bin/false")
    assert versions(["numpy", "no-such-package"], sys.executable) == {"numpy": np.__version__}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transformers is measured; Optimum is not there, which is a line and no failure."""
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "peers.json"
    words = ["bench", "peers", str(checkpoint), "--threads", "1", "--prompt", "8", "--repeat", "1"]
    options = [
        "--new-tokens",
        "2",
        "--sequences",
        "1",
        "3",
        "--peer",
        "transformers bf16",
        "--peer",
        "optimum",
    ]
    python = ["--optimum-python", "/bin/false", "--work", str(tmp_path)]
    assert main([*words, *options, *python, "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "not measured: /bin/false does not run this package" in printed
    result = json.loads(output.read_text())
    names = [peer["name"] for peer in result["peers"]]
    assert names == ["transformers bf16"]
    for peer in result["peers"]:
        assert peer["versions"].keys() == {"torch", "transformers"}
        assert peer["decode"].keys() == {"1", "3"}
        for rate in (peer["prefill"], *peer["decode"].values()):
            assert min(rate.values()) > 0
    assert list(result["not_measured"]) == ["Optimum fp32"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "peers.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "0"], "--prompt is 0"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--sequences", "1", "0"], "--sequences is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--layers", "99"], "--layers is 99"),
        (["--prompt", "40000", "--layers", "1"], "beyond the 32768"),
        (["--peer", "ollama"], "--peer 'ollama' is unknown"),
        (["none"], "not a checkpoint directory"),
        (["none", "--layers", "1"], "for a drawn model"),
        (["none", "--model", "internvl3-8b"], "for a drawn model"),
        (["--model", "gpt-2"], "unknown model 'gpt-2'"),
        (["--json", "none/file"], "cannot write"),
        (["--work", "none"], "--work"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
