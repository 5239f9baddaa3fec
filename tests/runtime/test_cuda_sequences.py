"""What `max_sequences` takes on CUDA, with the stand-in: decoders, caches, memory, refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrating import few_items
from checkpoints import GOLDEN, small_config, write_checkpoint
from host_driver import HostDriver
from many import ASKED, alone, same
from side_by_side import CONTEXT, load, noted_sizes

from internvl_edge.bundle.errors import CapacityError, ContextError, LimitError
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.runtime import InternVL, UsageError
from internvl_edge.runtime.backends import Slice, int8_cache

WAITS = ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each pass has."""
    return noted_sizes(monkeypatch)


def test_kept_caches_give_up_their_slots(
    bindings: HostDriver, golden_bundle: Path, sizes: list[int]
) -> None:
    """Those used longest ago; not one that a chat goes on with."""
    model = load(golden_bundle, reuse_bytes=1 << 30)
    chat = model.chat()
    chat.send("A question", max_new_tokens=3)
    for number in range(3):
        asked = [f"{word}, number {number}" for word in ("One", "Another")]
        sizes.clear()
        model.generate_batch(asked, max_new_tokens=6)
        assert 2 in sizes
    repeated = model.generate(asked[1], max_new_tokens=2)
    assert repeated.timings.cached_tokens == repeated.timings.prompt_tokens - 1
    cache: Any = chat._cache
    assert (cache.slot.storage.slots, cache.slot.index) == (3, 0)
    assert chat.send("Another", max_new_tokens=3).timings.cached_tokens > 10
    del cache, chat  # what is kept of it is nobody's any more
    new: list[Any] = [model.engine.new_cache(8) for _ in range(4)]
    assert [cache.slot.storage.slots for cache in new] == [3, 3, 3, 1]
    model.close()


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_other_decoders(
    bindings: HostDriver, tmp_path: Path, sizes: list[int], family: str
) -> None:
    """With biases, which a row of zeros has too; queries and keys normed, and apart."""
    config = small_config()
    del config["llm_config"]["bias"], config["llm_config"]["rope_scaling"]
    config["llm_config"] |= {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "head_dim": {"Qwen2": 16, "Qwen3": 32}[family],
    }
    path = export_bundle(write_checkpoint(tmp_path / "model", config), tmp_path / "bundle")
    one, several = (load(path, max_sequences=most, max_context=256) for most in (None, 3))
    asked = ["Hello", "Another question, " * 4, "Why?"]
    options = {"max_new_tokens": 10, "ignore_eos": True}
    wanted = [one.generate(each, **options) for each in asked]
    sizes.clear()
    same(several.generate_batch(asked, **options), wanted)
    assert 3 in sizes
    several.close()


@pytest.mark.parametrize(
    "options",
    [
        {"language": "fp16", "vision": "fp16"},
        {"kv": "fp16"},
        {"language": "int4", "kv": "int8", "options": QuantOptions(naive=True)},
    ],
    ids=["fp16", "fp16 cache", "int8 cache"],
)
def test_other_precisions(bindings: HostDriver, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each as alone on the same device."""
    if options.get("kv") == "int8" and not int8_cache.takes_int8_cache():
        pytest.skip("this onnxruntime has no int8 cache")
    with few_items():
        path = export_bundle(GOLDEN / "model", tmp_path / "bundle", sensitivity=False, **options)
    one, several = load(path, max_sequences=None), load(path)
    asked = [ASKED[0], ASKED[2], ASKED[5]]
    wanted = [alone(one, each, max_new_tokens=5) for each in asked]
    same(several.generate_batch(asked, max_new_tokens=5), wanted)
    several.close()


def test_where_a_pass_takes_one(
    bindings: HostDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads that are rotated before attention."""
    config = small_config(hidden=96)
    path = export_bundle(write_checkpoint(tmp_path / "model", config), tmp_path / "bundle")
    with caplog.at_level(logging.WARNING):
        model = load(path, max_context=64)
    assert "takes one sequence a pass" in caplog.text
    assert model.engine.backend.most_slices == 1


def test_one_unless_asked(bindings: HostDriver, golden_bundle: Path) -> None:
    """As the file is stored, caches as large as their requests."""
    model = load(golden_bundle, max_sequences=None)
    backend = model.engine.backend
    cache: Any = backend.new_cache(9)
    assert (backend.most_slices, cache.slot.storage.context) == (1, 9)
    empty = Slice(cache, np.zeros((1, 1), np.float32), 1.0, np.array([0]))
    with pytest.raises(LimitError, match="runs 1 sequence in a pass, got 2"):
        backend.forward([empty, empty])


def test_what_is_refused(bindings: HostDriver, golden_bundle: Path) -> None:
    with pytest.raises(UsageError, match="max_sequences is 0, it must be at least 1"):
        load(golden_bundle, max_sequences=0)
    with pytest.raises(UsageError, match="max_sequences"):
        load(golden_bundle, max_sequences=True)
    model = load(golden_bundle)
    with pytest.raises(ContextError, match=f"{CONTEXT + 1} tokens > {CONTEXT}"):
        model.engine.backend.new_cache(CONTEXT + 1)
    bindings.capacity = 1 << 26
    refused = f"memory for 1000 KV caches of {CONTEXT} tokens .*; lower max_sequences or lower max_"
    with pytest.raises(CapacityError, match=refused):
        load(golden_bundle, max_sequences=1000)


def test_the_cpu_takes_any_number(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=2, max_sequences=2)
    assert len(model.generate_batch(["a", "b", "c"], max_new_tokens=2)) == 3
    model.close()
