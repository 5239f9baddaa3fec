"""Memory is planned before it is taken: what there is, what is needed, what would help."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.bundle.manifest import Manifest, open_bundle
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.cli.main import main
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import CapacityError, InternVL, LimitError, memory
from internvl_edge.runtime.decoding.passes import MAX_CHUNK, prefill_chunk
from internvl_edge.runtime.memory import (
    MemoryGuard,
    MemoryPlan,
    available_memory,
    plan_memory,
    position_bytes,
)

GIB = 1 << 30


@pytest.fixture(scope="module")
def manifest(golden_bundle: Path) -> Manifest:
    return open_bundle(golden_bundle).manifest


def system(root: Path, **files: str) -> Path:
    """A file system root with these files under it."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(gib: float) -> str:
    return f"MemTotal: 99999999 kB\nMemAvailable:   {int(gib * 2**20)} kB\nSwapFree: 0 kB\n"


@pytest.mark.parametrize(
    ("most", "used", "stat", "expected"),
    [
        ("max", "0", "", 8.0),
        (str(6 * GIB), str(4 * GIB), "", 2.0),
        # File pages of the group are given back when it needs them.
        (str(6 * GIB), str(4 * GIB), f"active_file {GIB}\ninactive_file {2 * GIB}\n", 5.0),
        (str(64 * GIB), str(4 * GIB), "", 8.0),
    ],
)
def test_what_is_available(
    tmp_path: Path, most: str, used: str, stat: str, expected: float
) -> None:
    root = system(tmp_path, proc__meminfo=meminfo(8))
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("memory.max", most), ("memory.current", used), ("memory.stat", stat)):
        (group / name).write_text(text)
    assert available_memory(root) == pytest.approx(expected * GIB, rel=1e-6)


def test_without_meminfo_pages_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory(tmp_path) <= os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    names = {name: n for name, n in os.sysconf_names.items() if name != "SC_AVPHYS_PAGES"}
    monkeypatch.setattr(os, "sysconf_names", names)  # as on macOS
    assert available_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


def test_a_position_takes_what_the_cache_stores(golden_model: InternVL, manifest: Manifest) -> None:
    cache = golden_model.engine.backend.new_cache(8)
    cache.state.extend(np.arange(8), 1.0)
    assert cache.nbytes == 8 * position_bytes(manifest)


@given(tokens=st.integers(1, 400), tiles=st.integers(1, 13), more=st.integers(1, 50))
def test_more_never_takes_less(manifest: Manifest, tokens: int, tiles: int, more: int) -> None:
    def total(tokens: int, tiles: int, *, prepared: bool = False, low: bool = False) -> int:
        return plan_memory(
            manifest, tokens=tokens, tiles=tiles, prepared=prepared, low_memory=low
        ).total

    plain = total(tokens, tiles)
    assert total(tokens + more, tiles) >= plain  # equal where loading is the peak
    assert total(tokens, tiles + more) >= plain
    assert total(10 * tokens + 4000, tiles) > plain
    assert total(tokens, tiles, prepared=True) < plain
    assert total(tokens, tiles, low=True) < plain


def test_scores_are_counted_where_attention_holds_them(manifest: Manifest) -> None:
    def passes_of(tokens: int, *, scores: bool) -> int:
        return plan_memory(
            manifest, tokens=tokens, tiles=1, prepared=False, low_memory=False, scores=scores
        ).language

    heads, tokens = manifest.spec.language.num_attention_heads, 100_000
    rows = prefill_chunk(manifest.spec, tokens, scores=True)
    assert rows < MAX_CHUNK
    assert passes_of(tokens, scores=True) >= heads * rows * tokens * 4
    assert passes_of(tokens, scores=False) == passes_of(1000, scores=False)


def test_one_graph_at_a_time_takes_the_larger() -> None:
    plan = MemoryPlan(2, 4, 50, 100, 7, 9, images=3, kv_cache=11, low_memory=False, process=1)
    assert plan.total == 1 + 2 + 3 + (50 + 100) + (9 + 11)  # activations are given back
    assert replace(plan, vision=30).total == 1 + 2 + 3 + (50 + 100) + 30
    assert replace(plan, packing=40).total == 1 + 2 + 50 + 100 + 40  # the load is its peak
    plan = replace(plan, low_memory=True)
    assert plan.total == 1 + 2 + 3 + (100 + 9 + 11)
    assert replace(plan, vision=80).total == 1 + 2 + 3 + (50 + 80)
    assert replace(plan, packing=40).total == 1 + 2 + 100 + 40


def test_what_does_not_fit_is_refused_with_remedies(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 40 << 20)
    with pytest.raises(LimitError, match=r"0.04 GiB are free; run 'internvl-edge prepare'") as said:
        InternVL.load(golden_bundle, device="cpu", threads=1)
    error = said.value
    assert isinstance(error, CapacityError)
    assert error.needed is not None
    assert error.needed > error.free == 40 << 20
    for parameter in ("low_memory=True (saves ", "lower max_context", "kv='int8'"):
        assert parameter in str(error)
    assert "--" not in str(error)
    for option in ("--low-memory (saves ", "lower --max-context", "--kv int8"):
        assert option in error.told(flags=True)


def test_preparing_what_does_not_fit_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is packed in memory before it is saved: 'prepare' is no remedy."""
    monkeypatch.setattr(memory, "available_memory", lambda: memory.RESERVE_BYTES)
    with pytest.raises(CapacityError, match=r"^preparing this bundle takes .*larger mach") as said:
        prepare_bundle(bundle)
    assert Remedy.PREPARE not in said.value.remedies
    assert said.value.needed is not None
    assert said.value.needed > said.value.free == memory.RESERVE_BYTES
    assert not (bundle / "prepared").exists()


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_computed(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    monkeypatch.setattr(memory, "available_memory", lambda: memory.RESERVE_BYTES)
    with pytest.raises(LimitError, match="this prompt takes"):
        model.stream("What is it?")
    with pytest.raises(LimitError, match="this prompt takes"):
        model.chat().stream("What is it?")
    monkeypatch.undo()
    assert model.generate("What is it?", max_new_tokens=2).token_ids


def test_what_is_cached_already_is_not_counted_again(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and the process are there: a prompt is charged for what it adds."""
    guard = MemoryGuard(manifest, prepared=False, low_memory=False)
    plan = plan_memory(manifest, tokens=64, tiles=1, prepared=False, low_memory=False)
    added = plan.images + max(plan.vision, plan.language + plan.kv_cache)
    monkeypatch.setattr(memory, "available_memory", lambda: memory.RESERVE_BYTES + added)
    guard.check_prompt(64, 1)
    with pytest.raises(LimitError):
        guard.check_prompt(65, 1)
    with pytest.raises(LimitError):
        guard.check_load()


def test_low_memory_gives_the_same_answers(golden_bundle: Path, golden_model: InternVL) -> None:
    """Graphs are opened and closed in turns; the cache survives its session."""
    model = InternVL.load(golden_bundle, device="cpu", threads=1, low_memory=True, reuse_bytes=0)
    chat, other = model.chat(), golden_model.chat()
    for n, question in enumerate(("What is it?", "And this?", "Which is larger?")):
        images = [np.random.default_rng(n).integers(0, 256, (50, 70, 3), np.uint8)] if n < 2 else []
        got = chat.send(question, images, max_new_tokens=5)
        wanted = other.send(question, images, max_new_tokens=5)
        assert got.token_ids == wanted.token_ids
        assert got.timings.cached_tokens == wanted.timings.cached_tokens
        assert len(model.engine.backend._graphs._sessions) == 1


def test_inspect_states_the_plan(golden_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(golden_bundle)]) == 0
    told = json.loads(capsys.readouterr().out)["memory"]
    assert told["weights"] == "copied when loaded"
    (largest,) = (value for name, value in told.items() if name.endswith("_tiles_bytes"))
    assert told["one_tile_low_memory_bytes"] < told["one_tile_bytes"] < largest
