"""Several requests in one scheduler: each is answered as alone, whatever becomes of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign.interrupts import Moments
from numpy.typing import NDArray
from together import Together

from internvl_edge.bundle.errors import CapacityError
from internvl_edge.runtime import InternVL, LimitError, PrecisionError, PromptError, Sampling
from internvl_edge.runtime.backends import Cache, SelectingBackend, Slice, sessions
from internvl_edge.runtime.backends.own_kernels import NO_KERNELS
from internvl_edge.runtime.decoding import passes
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.policy import Policy
from internvl_edge.runtime.decoding.request import Event, Request
from internvl_edge.runtime.decoding.scheduler import Scheduler

PIXELS = np.random.default_rng(3).integers(0, 256, (100, 150, 3), np.uint8)
SLOT = "<image>\nWhat is written here?"


def request(model: InternVL, prompt: str, images: Sequence[Any] = (), **asked: Any) -> Request:
    tiled = [model.tile_with_identity(image, 2) for image in images]
    ids = model.encode_conversation([(prompt, None)], tiled, None)
    return Request(ids, model.inputs.stop_ids, tiled, **asked)


def run(scheduler: Scheduler, handles: list[Handle]) -> list[Event]:
    """Step until all have ended."""
    events = []
    for _ in range(1000):
        if not any(handle.alive for handle in handles):
            return events
        events += scheduler.step()
    raise AssertionError("it goes on for ever")


def mixed(model: InternVL) -> list[Request]:
    return [
        request(model, "Hello", max_new_tokens=9),
        request(model, SLOT, [PIXELS], max_new_tokens=12),
        request(model, "Hello", max_new_tokens=7, sampling=Sampling(temperature=1.3, seed=5)),
        request(model, SLOT, [255 - PIXELS], max_new_tokens=3, stop=["zzz"]),
    ]


@pytest.mark.parametrize("reuse", [0, 1 << 30])
@pytest.mark.parametrize("slices", [1, 3, 8])
def test_each_is_answered_as_alone(
    golden_bundle: Path, golden_model: InternVL, reuse: int, slices: int
) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=reuse)
    model.engine.backend = backend = Together(model.engine.backend, slices)
    scheduler = Scheduler(model.answering)
    handles = [scheduler.add(one) for one in mixed(model)]
    events = run(scheduler, handles)
    for handle, alone in zip(handles, mixed(golden_model), strict=True):
        other = Scheduler(golden_model.answering)
        wanted = other.add(alone)
        run(other, [wanted])
        own = [event for event in events if event.request is handle.request]
        assert handle.ids == wanted.ids == [event.token for event in own]
        assert handle.reply is not None
        assert "".join(event.piece for event in own).strip() == handle.reply.text
        assert [event.finish for event in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish == handle.reply.finish_reason
        assert len(handle.request.timings.token_s) == len(own)
    assert scheduler.step() == []
    assert max(backend.passes) == min(slices, 4)


def test_who_gets_no_cache_waits_and_is_promised_nothing(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1, reuse_bytes=0)
    scheduler, promised = Scheduler(model.answering), model.answering.reservations

    def no_memory(capacity: int) -> Cache:
        raise CapacityError("no memory for a KV cache")

    asked = {"max_new_tokens": 9, "ignore_eos": True}
    first = scheduler.add(request(model, "Hello", **asked))
    alone = promised.promised
    with monkeypatch.context() as patch:
        patch.setattr(model.engine.backend, "new_cache", no_memory)
        second = scheduler.add(request(model, "Hello", **asked))
        scheduler.step()
        assert promised.promised == alone
        assert second.alive
    run(scheduler, [first, second])
    assert second.ids == first.ids
    assert promised.promised == 0


def test_prompts_come_one_by_one_while_others_decode(
    golden_model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt holds nobody up for longer than one of its passes."""
    monkeypatch.setattr(passes, "MAX_CHUNK", 16)
    patient = replace(golden_model.answering, policy=Policy(growth=math.inf))
    scheduler = Scheduler(patient)
    first = scheduler.add(request(golden_model, "Hello", max_new_tokens=60, ignore_eos=True))
    while not first.ids:
        scheduler.step()
    second = scheduler.add(request(golden_model, "word " * 60, max_new_tokens=2))
    third = scheduler.add(request(golden_model, "Hello", max_new_tokens=2))
    steps = 0
    while not second.ids:
        assert not third.ids
        tokens = len(first.ids)
        events = scheduler.step()
        assert len(first.ids) == tokens + 1
        assert events[-1].request is first.request
        steps += 1
    timings = second.request.timings
    assert steps == -(-(timings.prompt_tokens - timings.cached_tokens) // 16)


def test_a_cancelled_one_ends_before_its_next_pass(golden_model: InternVL) -> None:
    """Between tiles, between chunks and between tokens; its cache stays usable."""
    for steps in range(5):
        scheduler = Scheduler(golden_model.answering)
        one = scheduler.add(request(golden_model, SLOT, [PIXELS], max_new_tokens=50))
        other = scheduler.add(request(golden_model, "Hello", max_new_tokens=3))
        for _ in range(steps):
            scheduler.step()
        before = len(one.ids)
        one.cancel()
        (event,) = (event for event in scheduler.step() if event.request is one.request)
        assert (event.token, event.finish) == (None, "cancelled")
        assert one.reply is not None
        assert one.reply.finish_reason == "cancelled"
        assert len(one.ids) == before
        run(scheduler, [other])
        assert len(other.ids) == 3


@pytest.mark.parametrize("passes_before", [0, 1, 4])
def test_one_that_fails_takes_no_other_along(
    golden_bundle: Path, golden_model: InternVL, passes_before: int
) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    inner, failing = model.engine.backend, []
    spoilt: list[Cache] = []

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
            logits = inner.forward(batch)
            ends = np.cumsum([len(one.logit_rows) for one in batch])
            for one, end in zip(batch, ends, strict=True):
                if one.cache is not failing[0].cache:
                    continue
                spoilt.append(one.cache)
                if len(failing[0].ids) >= passes_before:
                    logits[end - len(one.logit_rows) : end] = np.nan
            return logits

    model.engine.backend = Broken()  # type: ignore[assignment]
    scheduler = Scheduler(model.answering)
    wanted = golden_model.generate("Hello", max_new_tokens=9)
    first = scheduler.add(request(model, "Hello", max_new_tokens=9))
    failing.append(scheduler.add(request(model, "Oh", max_new_tokens=9)))
    last = scheduler.add(request(model, "Hello", max_new_tokens=9))
    events: list[Event] = []
    with pytest.raises(PrecisionError):
        events.extend(event for _ in range(99) for event in scheduler.step())
    assert failing[0].failed
    assert failing[0].reply is None
    assert failing[0].cache is None
    assert spoilt[-1].state.length == 0
    events += run(scheduler, [first, last])
    for handle in (first, last):
        assert handle.ids == wanted.token_ids
        told = [event.token for event in events if event.request is handle.request]
        assert told == wanted.token_ids


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_step_that_an_interrupt_left_is_not_gone_on_with(golden_model: InternVL) -> None:
    """What it did to the tokens is not known: the answer ends as it stands."""
    asked = {"max_new_tokens": 9, "ignore_eos": True, "sampling": Sampling(speculate=0)}
    whole = golden_model.generate("Hello", **asked)
    for at in range(1, 3000, 7):
        scheduler = Scheduler(golden_model.answering)
        handle = scheduler.add(request(golden_model, "Hello", **asked))
        for _ in range(3):
            scheduler.step()
        counted = Moments(at, interrupt)
        with suppress(KeyboardInterrupt), counted:
            scheduler.step()
        run(scheduler, [handle])
        assert handle.reply is not None
        assert handle.ids == whole.token_ids[: len(handle.ids)]
        assert len(handle.ids) in (3, 4, 9)
        if counted.seen < at:
            break
    assert 100 < at < 2990


def test_log_probabilities_are_those_of_all_logits(golden_model: InternVL) -> None:
    hot = Sampling(temperature=1.5, top_k=5, seed=1)
    scheduler = Scheduler(golden_model.answering)
    asked = request(golden_model, "Hello", max_new_tokens=5, sampling=hot, logprobs=True)
    events = run(scheduler, [scheduler.add(asked)])
    ids = [event.token for event in events if event.token is not None]
    plain = request(golden_model, "Hello", max_new_tokens=5, sampling=hot)
    silent = run(scheduler, [scheduler.add(plain)])
    assert [(event.token, event.logprob) for event in silent] == [(token, None) for token in ids]
    logits = golden_model.logits([*asked.ids, *ids]).astype(np.float64)[len(asked.ids) - 1 : -1]
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    got = [event.logprob for event in events]
    np.testing.assert_allclose(got, wanted[range(len(ids)), ids], atol=1e-4)


def test_ignore_eos_goes_on_to_the_length(
    golden_model: InternVL, chat_arrays: dict[str, NDArray[Any]]
) -> None:
    ids = chat_arrays["early_stop_input_ids"][0].tolist()
    stopped = golden_model.generate(ids, max_new_tokens=20)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[-1] == golden_model.stop_id
    on = golden_model.generate(ids, max_new_tokens=20, ignore_eos=True)
    assert (on.finish_reason, len(on.token_ids)) == ("length", 20)
    assert on.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    chat = golden_model.chat()
    assert len(chat.send("Hello", max_new_tokens=300, ignore_eos=True).token_ids) == 300


@pytest.mark.parametrize(
    ("change", "error"),
    [({"max_new_tokens": 0}, LimitError), ({"prompt": "word " * 2000}, LimitError)],
    ids=["no tokens", "too long"],
)
def test_what_cannot_be_answered_is_not_taken(
    golden_model: InternVL, change: dict[str, Any], error: type[Exception]
) -> None:
    scheduler = Scheduler(golden_model.answering)
    with pytest.raises(error):
        scheduler.add(request(golden_model, **{"prompt": "Hello", **change}))
    with pytest.raises(PromptError):
        scheduler.add(Request([], golden_model.inputs.stop_ids))
    assert scheduler.step() == []


@pytest.mark.parametrize("slices", [0, 2])
def test_a_backend_of_one_refuses_more(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, slices: int
) -> None:
    monkeypatch.setattr(sessions, "bundle_kernels", lambda bundle: NO_KERNELS)
    model = InternVL.load(golden_bundle, device="cpu", threads=1)
    backend = model.engine.backend
    rows = np.zeros((1, model.spec.language.hidden_size), np.float32)
    batch = [Slice(backend.new_cache(4), rows, 1e4, np.zeros(1, np.int64))] * slices
    with pytest.raises(LimitError, match=f"runs 1 sequence in a pass, got {slices}"):
        backend.forward(batch)


def test_a_device_of_one_refuses_more(bindings: object, golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cuda", threads=1)
    backend = model.engine.backend
    assert isinstance(backend, SelectingBackend)
    calls: list[Callable[[], object]] = [
        lambda: backend.forward([]),
        lambda: backend.forward_candidates([], 1),
    ]
    for call in calls:
        with pytest.raises(LimitError, match="got 0; run them one by one"):
            call()
