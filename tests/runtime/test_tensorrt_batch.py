"""Several sequences in a pass of TensorRT's engines, with the stand-ins: each answered as alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import needs_newest
from checkpoints import GOLDEN
from earlier import of_one_sequence
from fake_tensorrt import FakeTensorRt, fake_build
from host_driver import HostDriver
from many import ASKED, alone, same
from side_by_side import caches, check_between, check_candidates, check_slots, held, new_run

from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.tensorrt.engines import build_engines, build_for_machine
from internvl_edge.export.tensorrt.profiles import plan_build, this_place
from internvl_edge.runtime import InternVL, UsageError
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.plans import FOLDER, Limits
from internvl_edge.runtime.backends.slots import together
from internvl_edge.runtime.backends.tensorrt_cache import Span
from internvl_edge.runtime.backends.tensorrt_library import Library

LIMITS = Limits(context=700, tokens=64, tiles=2, rows=4, sequences=3)
DIALECTS = [pytest.param("tensorrt", marks=needs_newest), "tensorrt-portable"]
WAITS = ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """The golden checkpoint in a dialect, written when first asked for."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(dialect: Any) -> Path:
        path = folder / dialect
        return path if path.exists() else export_bundle(GOLDEN / "model", path, dialect=dialect)

    return bundle


@pytest.fixture
def trt(bindings: HostDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    fake = FakeTensorRt(bindings)
    monkeypatch.setattr(Library, "open", lambda name=None: Library.of(fake))
    return fake


def build(path: Path, trt: FakeTensorRt, limits: Limits) -> Path:
    bundle, place = open_bundle(path), this_place(Cuda.open(), trt.library)
    memory = plan_build(bundle, limits, place, available=lambda: 1 << 40)
    build_engines(bundle, place, limits, memory, trt.library, overwrite=True, build=fake_build)
    return path


@pytest.fixture(params=DIALECTS)
def path(
    request: pytest.FixtureRequest, exported: Callable[[Any], Path], trt: FakeTensorRt
) -> Path:
    return build(exported(request.param), trt, LIMITS)


@pytest.fixture
def model(path: Path) -> InternVL:
    """Keeps nothing between prompts, so that each computes everything."""
    return InternVL.load(path, device="tensorrt", reuse_bytes=0)


def sequences_of(trt: FakeTensorRt) -> list[int]:
    """How many sequences the passes over next positions had."""
    shapes = [shape["positions"] for _, shape, _ in trt.passes if "positions" in shape]
    return [sequences for sequences, each in shapes if each == 1]


def test_a_batch_is_answered_as_each_alone(
    model: InternVL, golden_model: InternVL, trt: FakeTensorRt
) -> None:
    """More requests than a pass takes; each alone by the other dialect."""
    wanted = [alone(golden_model, one, max_new_tokens=12) for one in ASKED]
    for _ in range(2):  # the second time over captured steps
        same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    assert max(sequences_of(trt)) == LIMITS.sequences
    model.close()


def test_each_has_rotary_tables_of_its_own(model: InternVL, golden_model: InternVL) -> None:
    """Beyond the trained length each position has a base, which nobody else's changes."""
    trained = model.spec.language.max_position_embeddings
    ids = np.random.default_rng(0).integers(5, 400, trained + 9).tolist()
    asked = [ids[: trained - 3], ids[:20], ids]
    wanted = [golden_model.generate(one, max_new_tokens=9) for one in asked]
    same(model.generate_batch(asked, max_new_tokens=9), wanted)
    model.close()


def test_slots_between_keep_what_they_hold(model: InternVL) -> None:
    check_between(model)


def test_a_full_slot_between_is_left_out(model: InternVL, trt: FakeTensorRt) -> None:
    """It has no place for a row that nobody reads."""
    first, full, last = caches(model, [5, LIMITS.context, 4])
    before = held(full)
    groups = [[0], [1]]
    assert list(together([first.slot, last.slot])) == groups
    model.engine.run([new_run(model, cache, [9]) for cache in (first, last)])
    np.testing.assert_array_equal(held(full), before)
    assert {span.count for span in first.slot.storage.steps} == {1}
    full.state.truncate(0)
    model.engine.run([new_run(model, full, [7])])
    assert list(together([last.slot, first.slot])) == [[1, 0]]


def test_a_step_of_three(bindings: HostDriver, model: InternVL, trt: FakeTensorRt) -> None:
    """One wait, no memory, one graph, whose choice is of each row."""
    three = caches(model, [3, 4, 5])

    def step(token: int, count: int) -> list[Any]:
        runs = [new_run(model, cache, [token], count) for cache in three]
        return [found.logits for (found,) in model.engine.run(runs)]

    for token in (6, 7):
        step(token, 1)
    bindings.calls.clear()
    trt.passes.clear()
    for token in (8, 9):
        step(token, 1)
    assert bindings.named("cuMemAlloc", "cuMemHostAlloc", "cuLaunchKernel") == []
    assert bindings.named(*WAITS) == [(21,)] * 2
    assert len(bindings.named("cuGraphLaunch")) == 2
    assert trt.passes == []
    assert [call[2] for call in bindings.named("cuMemcpyDtoHAsync")] == [8] * 6
    assert {*three[0].slot.storage.steps} == {Span(0, 3, 256)}


def test_candidates_of_each_are_its_largest_logits(model: InternVL) -> None:
    check_candidates(model)


def test_a_slot_serves_the_next_cache_and_more_than_slots_have_memory_of_their_own(
    bindings: HostDriver, model: InternVL
) -> None:
    check_slots(bindings, model)


def test_a_prompt_begun_beside_is_copied_on_the_device(path: Path, golden_model: InternVL) -> None:
    """From slot to slot, and to a storage of one."""
    model = InternVL.load(path, device="tensorrt")
    asked = ["word " * 60] * 5
    got = model.generate_batch(asked, max_new_tokens=4)
    tokens = got[0].timings.prompt_tokens
    assert [one.timings.cached_tokens for one in got] == [0, *[tokens - 1] * 4]
    same(got, [alone(golden_model, asked[0], max_new_tokens=4)] * 5)
    model.close()


def test_kept_caches_give_up_their_slots(path: Path) -> None:
    model = InternVL.load(path, device="tensorrt")
    for question in ("One", "Another", "A third one", "The last"):
        model.generate(question, max_new_tokens=2)
    new: list[Any] = [model.engine.new_cache(8) for _ in range(4)]
    assert [cache.slot.storage.slots for cache in new] == [3, 3, 3, 1]


def test_no_more_sequences_than_the_engines_are_for(path: Path) -> None:
    """Fewer take less memory; auto is no excuse for other answers than were asked for."""
    named = rf"max_sequences is 4, the engines are for 3; .* build {path} --max-sequences 4"
    for device in ("tensorrt", "auto"):
        with pytest.raises(UsageError, match=named):
            InternVL.load(path, device=device, max_sequences=4)
    for asked, slots in ((None, 3), (3, 3), (2, 2), (1, 1)):
        model = InternVL.load(path, device="tensorrt", max_sequences=asked)
        cache: Any = model.engine.backend.new_cache(8)
        assert cache.slot.storage.slots == slots
        assert (model.engine.backend.most_slices == 1) == (slots == 1)


def test_engines_are_built_for_as_many_sequences_as_are_asked_for(
    path: Path, tmp_path: Path, trt: FakeTensorRt
) -> None:
    """Beside those of a longer context that are for one; without a builder they are found."""
    own = Path(shutil.copytree(path, tmp_path / "own"))
    shutil.rmtree(own / FOLDER)
    build(own, trt, Limits(context=900, tokens=64, tiles=2, rows=4))
    given: Any = {"device": "tensorrt", "max_sequences": 3}
    with pytest.raises(UsageError, match="is 3, the engines are for 1"):
        InternVL.load(own, **given)
    for builder in (partial(build_for_machine, build=fake_build), None):
        model = InternVL.load(own, **given, max_context=700, build_engines=builder)
        cache: Any = model.engine.backend.new_cache(8)
        assert (cache.slot.storage.slots, cache.slot.storage.context) == (3, 700)
    assert len([*(own / FOLDER).glob("sm*")]) == 2


def test_a_bundle_written_earlier_takes_one_sequence_a_pass(
    path: Path, tmp_path: Path, golden_model: InternVL, trt: FakeTensorRt
) -> None:
    older = of_one_sequence(path, tmp_path / "older")
    refused = pytest.raises(UsageError, match="max_sequences is 3; this bundle was written when")
    with refused:
        build(older, trt, LIMITS)
    shutil.rmtree(older / FOLDER, ignore_errors=True)
    given: Any = {"device": "tensorrt", "build_engines": build_for_machine}
    with refused:
        InternVL.load(older, max_sequences=3, **given)
    build(older, trt, Limits(context=700, tokens=64, tiles=2, rows=4))
    model = InternVL.load(older, device="tensorrt", reuse_bytes=0)
    assert model.engine.backend.most_slices == 1
    wanted = [alone(golden_model, one, max_new_tokens=12) for one in ASKED]
    same(model.generate_batch(ASKED, max_new_tokens=12), wanted)
    model.close()
