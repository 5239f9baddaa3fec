"""The generate loop: cache reuse, chunks, stop strings, cancellation, timings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counted import CountedBackend
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.runtime import InternVL, Sampling
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.decoding import passes as engine
from internvl_edge.runtime.decoding.handle import StopStrings

QUESTION = "How many lanterns are there?"


class CountingBackend:
    """Passes everything on and notes how many rows and tiles were computed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.forwards: list[int] = []
        self.tiles = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_tiles(self, tiles: NDArray[np.uint8]) -> Any:
        self.tiles += len(tiles)
        return self._inner.encode_tiles(tiles)

    def forward(self, batch: Sequence[Slice]) -> Any:
        self.forwards += [len(one.rows) for one in batch]
        return self._inner.forward(batch)


@pytest.fixture
def counted(golden_bundle: Path) -> tuple[InternVL, CountingBackend]:
    model = InternVL.load(golden_bundle, device="cpu", threads=2)
    backend = CountingBackend(model.engine.backend)
    model.engine.backend = backend
    return model, backend


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (100, 150, 3), dtype=np.uint8)


def test_later_turns_prefill_only_what_they_add(
    counted: tuple[InternVL, CountingBackend], picture: NDArray[np.uint8]
) -> None:
    model, backend = counted
    chat = model.chat()
    first = chat.send(QUESTION, [picture], max_new_tokens=4, sampling={"speculate": 0})
    rows_after_first = sum(backend.forwards)
    # The prompt once, then one row for each token but the last, which was never run.
    assert rows_after_first == first.timings.prompt_tokens + len(first.token_ids) - 1
    backend.forwards.clear()
    second = chat.send("And now?", max_new_tokens=1)
    assert second.timings.cached_tokens >= first.timings.prompt_tokens
    assert sum(backend.forwards) == second.timings.prompt_tokens - second.timings.cached_tokens


def test_an_image_is_encoded_once_per_chat(
    counted: tuple[InternVL, CountingBackend], picture: NDArray[np.uint8]
) -> None:
    model, backend = counted
    chat = model.chat()
    chat.send(QUESTION, [picture], max_new_tokens=1)
    encoded = backend.tiles
    assert encoded == len(model.tile(picture))
    chat.send(QUESTION, max_new_tokens=1)
    again = chat.send("The same?", [Image.fromarray(picture)], max_new_tokens=1)
    assert backend.tiles == encoded
    assert again.timings.vision_s == 0
    chat.send("Another?", [255 - picture], max_new_tokens=1)
    assert backend.tiles == 2 * encoded


def test_a_chat_answers_as_a_fresh_run_would(
    golden_model: InternVL, picture: NDArray[np.uint8]
) -> None:
    """Reused rows are the rows a full prefill computes."""
    chat = golden_model.chat()
    chat.send(QUESTION, [picture], max_new_tokens=6)
    second = chat.send("And the lamps?", max_new_tokens=8)
    tiled = golden_model.tile_with_identity(picture, None)
    turns = [chat.history[0], ("And the lamps?", None)]
    ids = golden_model.encode_conversation(turns, [tiled], None)
    fresh = golden_model.generate(ids, [picture], max_new_tokens=8)
    assert second.timings.cached_tokens > 0
    assert second.token_ids == fresh.token_ids


def test_another_image_of_the_same_size_is_not_taken_for_the_first(
    golden_model: InternVL, picture: NDArray[np.uint8]
) -> None:
    tiled = [golden_model.tile_with_identity(image, None) for image in (picture, 255 - picture)]
    one, other = (image.identity.signatures(4) for image in tiled)
    assert not set(one) & set(other)
    assert all(signature < 0 for signature in (*one, *other))


@pytest.mark.parametrize("chunk", [16, 37, 512])
def test_chunked_prefill_is_the_whole_prefill(
    golden_model: InternVL,
    golden_images: dict[str, Image.Image],
    logits_arrays: dict[str, NDArray[Any]],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(engine, "MAX_CHUNK", chunk)
    ids = logits_arrays["single_input_ids"][0]
    got = golden_model.logits(ids, [golden_images["img0"]], 6)
    np.testing.assert_allclose(got, logits_arrays["single_logits"][0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("scores", [True, False])
def test_chunks_bound_the_attention_scores_that_are_held(
    golden_model: InternVL, scores: bool
) -> None:
    spec, other = golden_model.spec, golden_model.engine
    heads, backend = spec.language.num_attention_heads, CountedBackend(spec, holds_scores=scores)
    means = engine.Engine(backend, spec, other._embedding, golden_model.answering.prefixes)
    for total in (1000, 100_000, 3_000_000):
        sizes = [stop - start for start, stop in means._chunks(0, total)]
        assert sum(sizes) == total
        assert max(sizes) <= engine.MAX_CHUNK
        if scores:
            assert max(sizes) == 16 or max(sizes) * heads * total * 4 <= engine.SCORE_BYTES
        else:
            assert max(sizes) == min(engine.MAX_CHUNK, total)


def test_a_step_writes_its_row_in_place_and_nothing_else(golden_model: InternVL) -> None:
    """Past and present share one buffer: the address stays, earlier and later rows too."""
    backend = golden_model.engine.backend
    cache = backend.new_cache(64)
    hidden = golden_model.spec.language.hidden_size
    rows = np.random.default_rng(0).standard_normal((8, hidden)).astype(np.float32)
    theta = golden_model.spec.language.rope_theta
    buffers = [value.numpy() for value in cache.storage.values()]
    addresses = [value.data_ptr() for value in cache.storage.values()]
    backend.forward([Slice(cache, rows[:7], theta, np.array([6]))])
    cache.state.extend(np.arange(7), theta)
    before = [value.numpy().copy() for value in cache.storage.values()]
    backend.forward([Slice(cache, rows[7:], theta, np.array([0]))])
    assert [value.data_ptr() for value in cache.storage.values()] == addresses
    for old, value in zip(before, cache.storage.values(), strict=True):
        new = value.numpy()
        assert (new[:, :, 7] != 0).any()
        np.testing.assert_array_equal(new[:, :, :7], old[:, :, :7])
        np.testing.assert_array_equal(new[:, :, 8:], 0)
    assert len(buffers) == 2 * golden_model.spec.language.num_hidden_layers


def test_stream_pieces_join_to_the_answer(golden_model: InternVL) -> None:
    stream = golden_model.stream(QUESTION, max_new_tokens=20)
    pieces = list(stream)
    assert stream.reply is not None
    assert "".join(pieces).strip() == stream.reply.text
    assert stream.reply.text == golden_model.generate(QUESTION, max_new_tokens=20).text


def test_cancelling_ends_the_answer_and_keeps_the_chat_usable(golden_model: InternVL) -> None:
    chat = golden_model.chat()
    stream = chat.stream(QUESTION, max_new_tokens=200)
    for count, _ in enumerate(stream):
        if count == 3:
            stream.cancel()
    assert stream.reply is not None
    assert stream.reply.finish_reason == "cancelled"
    assert len(stream.reply.token_ids) < 200
    assert chat.history == [(QUESTION, stream.reply.text)]
    abandoned = chat.stream("And?", max_new_tokens=50)
    next(abandoned)
    final = chat.send("And then?", max_new_tokens=3)  # ends the abandoned turn first
    assert abandoned.reply is not None
    assert abandoned.reply.finish_reason == "cancelled"
    assert [question for question, _ in chat.history] == [QUESTION, "And?", "And then?"]
    assert final.timings.cached_tokens > 0


def test_stop_string_ends_the_answer(golden_model: InternVL) -> None:
    whole = golden_model.generate(QUESTION, max_new_tokens=16)
    stop = whole.text[5:8]
    cut = golden_model.generate(QUESTION, max_new_tokens=16, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert len(cut.token_ids) <= len(whole.token_ids)


def test_length_ends_the_answer_at_the_context(golden_bundle: Path) -> None:
    model = InternVL.load(golden_bundle, device="cpu", threads=2, max_context=200)
    prompt = model.encode_conversation([(QUESTION, None)], [], None)
    reply = model.generate(QUESTION, max_new_tokens=1000)
    assert reply.finish_reason == "length"
    assert len(prompt) + len(reply.token_ids) == 201  # the last token needs no place


def test_sampling_repeats_with_its_seed(golden_model: InternVL) -> None:
    hot = Sampling(temperature=1.5, top_k=50, seed=11)
    runs = [golden_model.generate(QUESTION, max_new_tokens=12, sampling=hot) for _ in range(2)]
    assert runs[0].token_ids == runs[1].token_ids
    other = golden_model.generate(
        QUESTION, max_new_tokens=12, sampling=Sampling(temperature=1.5, top_k=50, seed=12)
    )
    assert other.token_ids != runs[0].token_ids


def test_timings_add_up(golden_model: InternVL, picture: NDArray[np.uint8]) -> None:
    timings = golden_model.generate(QUESTION, [picture], max_new_tokens=5).timings
    assert len(timings.token_s) == 5
    assert len(timings.itl_s) == 4
    assert timings.token_s == sorted(timings.token_s)
    assert 0 < timings.preprocess_s + timings.vision_s + timings.prefill_s <= timings.ttft_s
    assert timings.tiles == len(golden_model.tile(picture))


@given(
    text=st.text(alphabet="ab#", max_size=30),
    stops=st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_cut_at_the_first(text: str, stops: list[str], cuts: list[int]) -> None:
    """However the text is cut into pieces."""
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    filter_ = StopStrings(stops)
    shown = ""
    for start, end in pairwise(bounds):
        shown += filter_.push(text[start:end])
        if filter_.hit:
            break
    shown += filter_.finish()
    # The first stop string to be complete ends the text; what stood before it is shown.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if not ends:
        assert shown == text
        assert not filter_.hit
    else:
        assert filter_.hit
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
