"""`device="tensorrt"` whole: a stand-in for the driver, and for TensorRT ONNX Runtime's CPU.

Passes are done when somebody waits, from the addresses they were queued with; so answers are right
only if buffers, cache, captured steps and waits are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import needs_newest
from candidates import check_candidates
from checkpoints import GOLDEN
from fake_tensorrt import FakeContext, FakeTensorRt, fake_build
from host_driver import HostDriver
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.cli.main import main
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.tensorrt import engines as export_engines
from internvl_edge.export.tensorrt.engines import build_engines
from internvl_edge.export.tensorrt.profiles import plan_build, this_place
from internvl_edge.runtime import BundleError, DeviceError, InternVL, LimitError, devices
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import Engines, Limits
from internvl_edge.runtime.backends.tensorrt_cache import TensorRtCache
from internvl_edge.runtime.backends.tensorrt_library import APIS, Library
from internvl_edge.runtime.backends.tensorrt_memory import MOST_BUCKETS, key_bucket, pieces

QUESTION = "How many lanterns are there?"
PIXELS = np.random.default_rng(3).integers(0, 256, (100, 150, 3), dtype=np.uint8)
#: More than one pass of prefill, and more than one bucket, for the golden prompts.
LIMITS = Limits(context=700, tokens=64, tiles=2, rows=4)
ALLOCATIONS = ("cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuMemFreeHost")
WAITS = ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")
DIALECTS = [pytest.param("tensorrt", marks=needs_newest), "tensorrt-portable"]

Export = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The golden checkpoint in a dialect, written when first asked for."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(dialect: Any) -> Path:
        path = folder / dialect
        if not path.exists():
            export_bundle(GOLDEN / "model", path, dialect=dialect)
        return path

    return bundle


@pytest.fixture
def trt(bindings: HostDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    fake = FakeTensorRt(bindings)
    monkeypatch.setattr(Library, "open", lambda name=None: Library.of(fake))
    return fake


def build(path: Path, trt: FakeTensorRt, limits: Limits = LIMITS) -> Engines:
    bundle, library = open_bundle(path), trt.library
    place = this_place(Cuda.open(), library)
    memory = plan_build(bundle, limits, place, available=lambda: 1 << 40)
    return build_engines(bundle, place, limits, memory, library, overwrite=True, build=fake_build)


@pytest.fixture(params=DIALECTS)
def path(request: pytest.FixtureRequest, exported: Export, trt: FakeTensorRt) -> Path:
    bundle = exported(request.param)
    build(bundle, trt)
    return bundle


@pytest.fixture
def model(path: Path) -> InternVL:
    """Keeps nothing between prompts, so that each computes everything."""
    return InternVL.load(path, device="tensorrt", reuse_bytes=0)


@pytest.fixture
def portable(exported: Export, trt: FakeTensorRt) -> Path:
    """For what does not depend on the dialect."""
    bundle = exported("tensorrt-portable")
    build(bundle, trt)
    return bundle


@pytest.mark.parametrize(
    ("name", "shown"), [("single", ["img0"]), ("multi_image", ["img0", "img1"]), ("text_only", [])]
)
def test_golden_answers(
    model: InternVL,
    golden_images: dict[str, Image.Image],
    golden_chats: dict[str, dict[str, Any]],
    chat_arrays: dict[str, NDArray[Any]],
    name: str,
    shown: list[str],
) -> None:
    """What the reference implementation answered."""
    wanted = chat_arrays[f"{name}_generated"][0].tolist()
    images = [golden_images[stem] for stem in shown]
    asked, count = golden_chats[name]["question"], len(wanted)
    for _ in range(2):  # the second time over captured steps
        got = model.generate(asked, images, max_tiles=6, max_new_tokens=count, extra_stops=False)
        assert got.token_ids == wanted


def test_every_logit_is_the_onnxruntime_dialects(model: InternVL, golden_model: InternVL) -> None:
    """Other operators and other pieces, float32 both: sums in another order."""
    rows = golden_model.encode_images([PIXELS])
    np.testing.assert_allclose(model.encode_images([PIXELS]), rows, atol=1e-4)
    ids = [5, *[model.context_id] * len(rows), 9, 11]
    wanted = golden_model.logits(ids, [PIXELS])
    np.testing.assert_allclose(model.logits(ids, [PIXELS]), wanted, atol=2e-4)


def rows_of(model: InternVL, ids: list[int]) -> NDArray[Any]:
    return model.engine._embedding.rows(np.array(ids))


def prefill(model: InternVL, tokens: int) -> TensorRtCache:
    """A cache with so many positions filled."""
    backend, theta = model.engine.backend, model.spec.language.rope_theta
    cache = backend.new_cache(LIMITS.context)
    assert isinstance(cache, TensorRtCache)
    ids = list(range(5, 5 + tokens))
    backend.forward([Slice(cache, rows_of(model, ids), theta, np.array([tokens - 1]))])
    cache.state.extend(np.array(ids), theta)
    return cache


@pytest.mark.parametrize(("count", "copied"), [(0, None), (1, 8), (5, 512)])
def test_a_step_of_decoding(
    bindings: HostDriver, model: InternVL, trt: FakeTensorRt, count: int, copied: int | None
) -> None:
    """One wait, no memory, one graph; a row to the device, a row of logits or the largest back."""
    cache = prefill(model, 3)
    for token in (6, 7):
        model.engine.decode_candidates(cache, token, count)
    bindings.calls.clear()
    trt.passes.clear()
    for token in (8, 9, 10):
        model.engine.decode_candidates(cache, token, count)
    assert bindings.named("cuLaunchKernel") == []  # the choice is part of the graph
    assert bindings.named(*ALLOCATIONS) == []
    assert bindings.named(*WAITS) == [(21,)] * 3
    assert len(bindings.named("cuGraphLaunch")) == 3
    assert trt.passes == []  # launched, not queued again
    language = model.spec.language
    sent = sum(call[2] for call in bindings.named("cuMemcpyHtoDAsync"))
    assert sent == 3 * (language.hidden_size * 4 + 8 + 8)  # the embedding, its position, the row
    fetched = [call[2] for call in bindings.named("cuMemcpyDtoHAsync")]
    assert fetched == 3 * [copied or language.vocab_size * 4]
    runs = len(bindings.named("cuMemcpy3DAsync"))
    assert runs == (3 if model.engine.backend._buffers.fresh is not None else 0)


def test_a_batch_is_one_sequence(model: InternVL) -> None:
    backend: Any = model.engine.backend
    for call in (backend.forward, partial(backend.forward_candidates, count=1)):
        with pytest.raises(LimitError, match="runs 1 sequence in a pass, got 0"):
            call([])


def test_candidates_are_the_largest_logits(model: InternVL) -> None:
    """Run, captured and launched, and the same in the next stretch of the cache."""
    steps = zip(range(5, 25), range(1, 21), strict=True)
    check_candidates(model.engine, prefill(model, 60), prefill(model, 60), steps)


def test_one_graph_per_stretch_of_the_cache(model: InternVL, trt: FakeTensorRt) -> None:
    cache = prefill(model, 60)
    trt.passes.clear()
    for token in range(400):
        model.engine.decode(cache, 5 + token % 50)
    # Twice each: run once, so that nothing is left to prepare, and captured.
    expected = [(keys, captured) for keys in (256, 512) for captured in (False, True)]
    got = [(shapes["key_positions"][0], captured) for _, shapes, captured in trt.passes]
    assert got == expected
    assert {span.keys for span in cache.slot.storage.steps} == {256, 512}
    contexts = {id(context) for context, *_ in trt.passes}
    assert len(contexts) == 2  # a graph is its context's alone
    assert {context.scratch for context in trt.contexts} == {trt.contexts[0].scratch}


def test_past_and_present_are_one_place_or_rows_are_appended(
    model: InternVL, trt: FakeTensorRt
) -> None:
    cache = prefill(model, 3)
    model.engine.decode(cache, 4)
    context: FakeContext = trt.passes[-1][0]
    past = {n[5:]: a for n, a in context.addresses.items() if n.startswith("past.")}
    present = {n[8:]: a for n, a in context.addresses.items() if n.startswith("present.")}
    storage = cache.slot.storage
    size = storage.memory.nbytes // len(past)
    first = storage.memory.address
    assert sorted(past.values()) == [first + i * size for i in range(len(past))]
    fresh = model.engine.backend._buffers.fresh
    if fresh is None:
        assert present == past
    else:
        row = size // LIMITS.context
        assert sorted(present.values()) == [fresh.address + i * row for i in range(len(past))]


def test_a_pass_writes_its_own_rows_of_the_cache_and_nothing_else(model: InternVL) -> None:
    theta = model.spec.language.rope_theta
    cache = model.engine.backend.new_cache(LIMITS.context)
    assert isinstance(cache, TensorRtCache)
    memory = cache.slot.storage.memory
    assert not memory.to_host().any()  # cleared, whatever the memory held before
    for start, ids in ((0, list(range(5, 105))), (100, [6]), (101, [7]), (102, [8])):
        before = memory.to_host()
        model.engine.backend.forward([Slice(cache, rows_of(model, ids), theta, np.array([0]))])
        cache.state.extend(np.array(ids), theta)
        changed = np.flatnonzero((memory.to_host() != before).any(axis=(0, 1, 2, 4)))
        assert changed.tolist() == list(range(start, start + len(ids)))


def test_a_prompt_begun_earlier_is_copied_on_the_device(
    bindings: HostDriver, path: Path, golden_model: InternVL
) -> None:
    model = InternVL.load(path, device="tensorrt")
    question = f"{QUESTION} And lamps?"
    model.generate(QUESTION, [PIXELS], max_new_tokens=3)
    got = model.generate(question, [PIXELS], max_new_tokens=5)
    assert got.timings.cached_tokens > got.timings.prompt_tokens // 2
    wanted = golden_model.generate(question, [PIXELS], max_new_tokens=5)
    assert got.token_ids == wanted.token_ids


def test_beyond_the_trained_length(model: InternVL, golden_model: InternVL) -> None:
    """Dynamic NTK gives every step there tables of its own."""
    trained = model.spec.language.max_position_embeddings
    assert trained + 5 < LIMITS.context
    ids = np.random.default_rng(0).integers(5, 400, trained - 3).tolist()
    wanted = golden_model.generate(ids, max_new_tokens=6)
    assert model.generate(ids, max_new_tokens=6).token_ids == wanted.token_ids


def test_memory_and_graphs_of_a_cache_serve_the_next(
    bindings: HostDriver, portable: Path, trt: FakeTensorRt
) -> None:
    model = InternVL.load(portable, device="tensorrt", reuse_bytes=0)
    first = model.generate("Hello", max_new_tokens=5)
    contexts, held = len(trt.contexts), len(bindings.memory)
    bindings.calls.clear()
    assert model.generate("Hello", max_new_tokens=5).token_ids == first.token_ids
    assert len(trt.contexts) == contexts
    assert bindings.named("cuMemAlloc", "cuGraphInstantiate") == []
    two = [model.engine.backend.new_cache(8) for _ in range(3)]
    assert len({id(cache.slot.storage) for cache in two if isinstance(cache, TensorRtCache)}) == 3
    del two
    assert len(bindings.memory) == held  # one is kept, no more


def test_a_library_that_cannot_capture_yet_runs(portable: Path, trt: FakeTensorRt) -> None:
    """RTX compiles kernels while it runs, and says when it has them all."""
    asks = next(api for api in APIS if api.asks_capturable)
    answers = iter([False, False, True])
    trt.capturable = lambda context: next(answers)
    library = trt.library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Library, "open", lambda: replace(library, api=replace(asks, library="tensorrt"))
        )
        model = InternVL.load(portable, device="tensorrt", reuse_bytes=0)
    cache = prefill(model, 3)
    trt.passes.clear()
    for token in range(6):
        model.engine.decode(cache, 5 + token)
    assert [captured for *_, captured in trt.passes] == [False, False, False, True]


@given(
    tokens=st.integers(1, 300),
    chosen=st.sets(st.integers(0, 299), min_size=1),
    most_tokens=st.integers(1, 80),
    most_rows=st.integers(1, 9),
)
def test_pieces_cover_a_pass_and_stay_within_the_limits(
    tokens: int, chosen: set[int], most_tokens: int, most_rows: int
) -> None:
    wanted = np.array(sorted(row for row in chosen if row < tokens), np.int64)
    limits = Limits(300, most_tokens, 1, most_rows)
    parts = list(pieces(tokens, wanted, limits))
    assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]]
    assert parts[-1].stop == tokens
    assert all(0 < part.stop - part.start <= most_tokens for part in parts)
    assert all(len(part.wanted) <= most_rows for part in parts)
    together = np.concatenate([part.start + part.wanted for part in parts])
    np.testing.assert_array_equal(together, wanted)


@given(context=st.integers(1, 200_000), share=st.floats(0, 1))
def test_buckets_are_enough_and_few(context: int, share: float) -> None:
    total = max(1, int(context * share))
    assert total <= key_bucket(total, context) <= context
    step = max(256, context // MOST_BUCKETS)
    distinct = {key_bucket(n, context) for n in [*range(1, context, step), context]}
    assert len(distinct) <= MOST_BUCKETS + 1


# What is not as it should be.


def test_a_longer_context_than_was_built_for(portable: Path, trt: FakeTensorRt) -> None:
    with pytest.raises(DeviceError, match=r"context was 700, 800 is asked for.*--max-context 800"):
        InternVL.load(portable, device="tensorrt", max_context=800)
    model = InternVL.load(portable, device="tensorrt")
    assert model.max_context == LIMITS.context
    with pytest.raises(LimitError, match="701 tokens > 700 the engines were built for"):
        model.engine.backend.new_cache(701)


def test_a_cache_that_does_not_fit(bindings: HostDriver, portable: Path) -> None:
    model = InternVL.load(portable, device="tensorrt")
    bindings.capacity = sum(block.nbytes for block in bindings.memory.values()) + 1000
    with pytest.raises(LimitError, match="no device memory for a KV cache of 700 tokens"):
        model.engine.backend.new_cache(10)


def test_a_plan_that_was_not_built_here_is_not_loaded(portable: Path, trt: FakeTensorRt) -> None:
    engines = build(portable, trt)
    plan = engines.path / "language.plan"
    plan.write_text(plan.read_text().replace("700", "701"))
    with pytest.raises(BundleError, match="was altered"):
        InternVL.load(portable, device="tensorrt", verify="size")
    assert trt.contexts == []


def test_a_plan_the_library_does_not_load(
    portable: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engines, "plan", lambda self, graph: nullcontext(portable / "config.bin"))
    (portable / "config.bin").write_text("not a plan")
    with pytest.raises(BundleError, match="does not load it: magic tag does not match"):
        InternVL.load(portable, device="tensorrt")


def test_a_plan_of_another_graph(
    portable: Path, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = build(portable, trt)
    vision = engines.path / "vision.plan"
    monkeypatch.setattr(Engines, "plan", lambda self, graph: nullcontext(vision))
    with pytest.raises(BundleError, match="is not of this bundle"):
        InternVL.load(portable, device="tensorrt")


def test_auto_takes_the_engine(portable: Path, trt: FakeTensorRt) -> None:
    model = InternVL.load(portable)
    assert model.engine.backend.description == "tensorrt 10.16.2, stand-in"


def test_auto_says_once_why_it_is_the_cpu(
    portable: Path, trt: FakeTensorRt, caplog: pytest.LogCaptureFixture
) -> None:
    trt.__version__ = "10.17.0"
    devices._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        models = [InternVL.load(portable, threads=1) for _ in range(2)]
    (record,) = caplog.records
    assert "TensorRT was tensorrt 10.16.2, is tensorrt 10.17.0" in record.getMessage()
    assert "internvl-edge build" in models[1].engine.backend.description


def test_engines_are_built_when_asked_for(portable: Path, trt: FakeTensorRt) -> None:
    """Another version of TensorRT: refused with the command, or built there and then."""
    trt.__version__ = "10.18.1"
    with pytest.raises(DeviceError, match=r"run 'internvl-edge build .*build_engines="):
        InternVL.load(portable, device="tensorrt")
    builder = partial(export_engines.build_for_machine, build=fake_build)
    InternVL.load(portable, device="tensorrt", build_engines=builder, max_context=300)
    assert InternVL.load(portable, device="tensorrt", max_context=300).max_context == 300


def test_a_bundle_that_has_no_engines(
    golden_bundle: Path, trt: FakeTensorRt, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(golden_bundle), "-p", "Hi", "--device", "tensorrt"]) == 2
    assert "has no engines; export --for tensorrt" in capsys.readouterr().err
