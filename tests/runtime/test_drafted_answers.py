"""Answers whose tokens were guessed ahead are those that one pass a token gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import interrupts
from guessing import eager, load_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from scripted import Scripted, scripted
from together import Together

from internvl_edge.bundle.extras import example_room
from internvl_edge.examples.tiny_ocr.data import ALL_LINES, HELD_OUT, scene
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL, PrecisionError, Sampling, UsageError
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.decoding.request import Event, Request
from internvl_edge.runtime.decoding.sampling import filter_logits
from internvl_edge.runtime.decoding.scheduler import Scheduler
from internvl_edge.runtime.decoding.sequence import TokenSequence

pytestmark = pytest.mark.slow(seconds=1)

PLAIN = Sampling(speculate=0)
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def told(golden_bundle: Path) -> tuple[InternVL, Scripted]:
    model, backend = scripted(golden_bundle, reuse_bytes=0)
    return eager(model), backend


@pytest.fixture(scope="module")
def guessing(golden_bundle: Path) -> InternVL:
    return load_eager(golden_bundle, reuse_bytes=0)


Told = tuple[Any, str, Any]


def events(
    model: InternVL, sampling: Sampling, steps: int = 10_000, **asked: Any
) -> tuple[list[Told], Request]:
    """What an answer told; after some steps it is cancelled."""
    ids = model.encode_conversation([("Hello, hello", None)], [], None)
    request = Request(ids, model.inputs.stop_ids, sampling=sampling, **asked)
    scheduler = Scheduler(model.answering)
    handle = scheduler.add(request)
    cache = handle.cache
    assert cache is not None
    found: list[Event] = []
    for step in range(10_000):
        if not handle.alive:
            break
        if step == steps:
            handle.cancel()
        found += scheduler.step()
    assert handle.reply is not None
    assert "".join(event.piece for event in found).strip() == handle.reply.text
    assert handle.reply.finish_reason == found[-1].finish
    signatures, _ = cache.state.content()
    np.testing.assert_array_equal(signatures, [*ids, *handle.ids[:-1]] if handle.ids else [])
    return [(event.token, event.piece, event.finish) for event in found], request


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(st.sampled_from("abc"), max_size=30),
    most=st.integers(1, 9),
    limit=st.integers(1, 32),
    stop=st.sampled_from(["", "ab", "cab", "aaaa"]),
    steps=st.integers(0, 40),
    ignore_eos=st.booleans(),
)
def test_told_as_one_by_one(
    told: tuple[InternVL, Scripted],
    script: list[str],
    most: int,
    limit: int,
    stop: str,
    steps: int,
    ignore_eos: bool,
) -> None:
    """Token, text and end of every event; where it is cancelled, those before."""
    model, backend = told
    ids = [model.tokenizer.encode(letter)[-1] for letter in script]
    asked = {"max_new_tokens": limit, "stop": [stop], "ignore_eos": ignore_eos}
    backend.script = list(ids)
    plain, _ = events(model, PLAIN, **asked)
    backend.script = list(ids)
    found, request = events(model, Sampling(speculate=most), steps, **asked)
    if found[-1][2] == "cancelled":
        *found, last = found
        assert last[0] is None
        assert [token for token, _, _ in found] == [token for token, _, _ in plain[: len(found)]]
        assert all(finish is None for _, _, finish in found)
    else:
        assert found == plain
    timings = request.timings
    assert 0 <= timings.accepted_tokens <= timings.drafted_tokens
    assert timings.accepted_tokens <= len(timings.token_s)


def test_passes_are_saved_and_counted(told: tuple[InternVL, Scripted]) -> None:
    model, backend = told
    backend.script = [model.tokenizer.encode(letter)[-1] for letter in "abcde" * 8]
    backend.passes = []
    found, request = events(model, Sampling())
    rows = backend.passes[1:]
    assert len(rows) < 16 < len(found) == len(request.timings.token_s) == 41
    assert request.timings.drafted_tokens == sum(rows) - len(rows)
    assert request.timings.accepted_tokens == 41 - 1 - len(rows)
    assert type(request.timings.accepted_tokens) is int


def test_several_answers_guess_in_one_pass(golden_bundle: Path, golden_model: InternVL) -> None:
    model = load_eager(golden_bundle, reuse_bytes=0)
    backend: Any = Together(model.engine.backend, 4)
    model.engine.backend = backend
    scheduler = Scheduler(model.answering)
    prompts = ["Hello, hello", "no no no", "And now?"]
    requests = []
    for prompt in prompts:
        ids = model.encode_conversation([(prompt, None)], [], None)
        requests.append(Request(ids, (), max_new_tokens=50))
    handles = [scheduler.add(request) for request in requests]
    while any(handle.alive for handle in handles):
        scheduler.step()
    for prompt, handle in zip(prompts, handles, strict=True):
        wanted = golden_model.generate(prompt, sampling=PLAIN, max_new_tokens=50, ignore_eos=True)
        assert handle.ids == wanted.token_ids
        assert handle.request.timings.drafted_tokens
    assert max(backend.passes) == 3


def test_golden_answers(
    guessing: InternVL, golden_model: InternVL, golden_images: dict[str, Any]
) -> None:
    """Greedy, in float32, with a picture and after a turn."""
    drafted = accepted = 0
    for image in golden_images.values():
        how = {"system_message": "Look.", "max_tiles": 1}  # within the trained length
        one, other = guessing.chat(**how), golden_model.chat(**how)
        for turn, prompt in enumerate(("What is written here? What is here?", "What is it?")):
            given = [image] if turn == 0 else []
            asked = {"max_new_tokens": 60, "ignore_eos": True}
            reply = one.send(prompt, given, **asked)
            wanted = other.send(prompt, given, sampling=PLAIN, **asked)
            assert reply.token_ids == wanted.token_ids
            assert reply.timings.cached_tokens == wanted.timings.cached_tokens
            drafted += reply.timings.drafted_tokens
            accepted += reply.timings.accepted_tokens
    assert accepted > 0 < drafted - accepted


def test_receipts_read_twice(tmp_path: Path) -> None:
    """A trained model repeats what it read: most of it is guessed."""
    model = load_eager(export_bundle(example_room() / "checkpoint", tmp_path / "bundle"))
    scenes = [scene(HELD_OUT + seed) for seed in range(20)]
    tokens = accepted = 0
    for drawn in scenes:
        if len(drawn.fields) > 4:  # it was trained to read so many
            continue
        guessed, plain = model.chat(), model.chat()
        for _ in range(2):
            images = [] if plain.history else [drawn.image]
            reply = guessed.send(ALL_LINES, images)
            assert reply.token_ids == plain.send(ALL_LINES, images, sampling=PLAIN).token_ids
        tokens += len(reply.token_ids)
        accepted += reply.timings.accepted_tokens
    assert accepted > tokens / 2 > 50


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.8},
        {"temperature": 0.9, "repetition_penalty": 1.3, "min_p": 0.02},
        {"repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_tokens(
    guessing: InternVL, golden_model: InternVL, sampling: dict[str, Any]
) -> None:
    drafted = 0
    for seed in range(4):
        given = {**sampling, "seed": seed, "speculate": 7}
        asked = {"max_new_tokens": 40, "ignore_eos": True}
        reply = guessing.generate("Hello hello", sampling=given, **asked)
        wanted = golden_model.generate("Hello hello", sampling={**given, "speculate": 0}, **asked)
        assert reply.token_ids == wanted.token_ids
        drafted += reply.timings.drafted_tokens
    assert drafted > 10


def test_probabilities_are_of_all_tokens(guessing: InternVL, golden_model: InternVL) -> None:
    told = []
    for model in (guessing, golden_model):
        ids = model.encode_conversation([("Hello", None)], [], None)
        request = Request(ids, (), max_new_tokens=50, logprobs=True)
        scheduler = Scheduler(model.answering)
        handle = scheduler.add(request)
        found: list[Event] = []
        while handle.alive:
            found += scheduler.step()
        told.append([event.logprob for event in found])
    np.testing.assert_allclose(told[0], told[1], atol=1e-4)


class Markov:
    """Logits by the last token alone: drawn once."""

    def __init__(self, model: InternVL, tokens: Sequence[int]) -> None:
        self._inner: Any = model.engine.backend
        vocab = model.spec.language.vocab_size
        table = model.engine._embedding.rows(np.arange(vocab))
        self._ids = {row.tobytes(): token for token, row in enumerate(table)}
        self.logits = np.full((vocab, vocab), -np.inf, np.float32)
        drawn = np.random.default_rng(5).standard_normal((vocab, len(tokens))) * 1.5
        self.logits[:, list(tokens)] = drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        (new,) = batch
        last = [self._ids[row.tobytes()] for row in new.rows[new.logit_rows]]
        return self.logits[last]


def test_the_distribution_is_that_of_the_filtered_logits(golden_bundle: Path) -> None:
    """Pearson's test of every transition, at one in a thousand in all, by Bonferroni."""
    model = load_eager(golden_bundle, reuse_bytes=0)
    tokens = list(range(100, 106))
    backend: Any = Markov(model, tokens)
    model.engine.backend = backend
    sampling = Sampling(temperature=0.8, top_k=5, top_p=0.97, seed=11)
    pairs: Counter[tuple[int, int]] = Counter()
    drafted = accepted = 0
    for seed in range(40):
        given = {"temperature": 0.8, "top_k": 5, "top_p": 0.97, "seed": seed}
        reply = model.generate("Hello", sampling=given, max_new_tokens=200, ignore_eos=True)
        pairs.update(zip(reply.token_ids, reply.token_ids[1:], strict=False))
        drafted += reply.timings.drafted_tokens
        accepted += reply.timings.accepted_tokens
    assert accepted > 1000 < drafted - accepted
    for last in tokens:
        scores = filter_logits(backend.logits[last], [], sampling)[tokens]
        weights = np.exp(scores - scores.max())
        kept = weights > 0
        counts = np.array([pairs[last, token] for token in tokens])
        assert not counts[~kept].any()
        wanted = weights[kept] / weights.sum() * counts.sum()
        assert chisquare(counts[kept], wanted).pvalue > 1e-3 / len(tokens)


class Broken(Scripted):
    """Computes no numbers from a place on."""

    place = 9

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        logits = super().forward(batch)
        (new,) = batch
        places = new.cache.state.length + new.logit_rows - self._origin
        logits[places >= self.place] = np.nan
        return logits


def test_values_that_are_no_numbers_are_told_where_they_would_be(golden_bundle: Path) -> None:
    told = []
    for most in (0, 7):
        model = load_eager(golden_bundle, reuse_bytes=0)
        backend = Broken(model.engine.backend, model.stop_id)
        any_backend: Any = backend
        model.engine.backend = any_backend
        backend.script = [101, 102, 103] * 9
        stream = model.stream("Hello", sampling={"speculate": most}, max_new_tokens=30)
        shown: list[str] = []
        with pytest.raises(PrecisionError):
            shown.extend(stream)
        told.append((stream._handle.ids, "".join(shown)))
    assert told[0] == told[1]
    assert told[0][0] == [101, 102, 103] * 3


def test_guesses_behind_the_answer_may_be_no_numbers(golden_bundle: Path) -> None:
    model = load_eager(golden_bundle, reuse_bytes=0)
    backend = Broken(model.engine.backend, model.stop_id)
    any_backend: Any = backend
    model.engine.backend = any_backend
    backend.script = [101, 102, 103] * 9
    backend.place = 13
    reply = model.generate("Hello", max_new_tokens=13)
    assert reply.token_ids == ([101, 102, 103] * 9)[:13]


def test_rows_of_one_pass_are_rotated_as_one_by_one(guessing: InternVL) -> None:
    """Where each length has a base of its own, nothing is guessed."""
    engine, language = guessing.engine, guessing.spec.language
    trained = language.max_position_embeddings
    cache = engine.backend.new_cache(trained + 20)
    for length, room in ((trained - 9, 7), (trained - 8, 7), (trained - 7, 0), (trained, 0)):
        cache.state.truncate(0)
        cache.state.extend(np.zeros(length, np.int64), 1.0)
        assert engine.room_to_guess(cache, 7) == room
    small = engine.backend.new_cache(30)
    small.state.extend(np.zeros(25, np.int64), 1.0)
    assert [engine.room_to_guess(small, most) for most in (0, 3, 9)] == [0, 3, 4]


@pytest.fixture(scope="module")
def int8_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv8")
    return export_bundle(GOLDEN / "model", folder / "bundle", kv="int8", sensitivity=False)


def test_an_int8_cache_holds_what_was_chosen(int8_cache: Path) -> None:
    """Rows that were cut off are written over; the next turn goes on from the right ones."""
    model = load_eager(int8_cache)
    chat, plain = model.chat(), model.chat()
    asked = {"max_new_tokens": 50, "ignore_eos": True}
    accepted = 0
    for prompt in ("Hello hello hello", "And now?"):
        reply = chat.send(prompt, **asked)
        assert reply.token_ids == plain.send(prompt, sampling=PLAIN, **asked).token_ids
        accepted += reply.timings.accepted_tokens
    assert accepted


def test_interrupts_within_drafts(golden_bundle: Path) -> None:
    def load(reuse: int) -> InternVL:
        return load_eager(golden_bundle, reuse_bytes=reuse)

    totals = interrupts.run(load, 24, lambda number: number < 3)
    assert totals.faults == []
    assert totals.tried == totals.right + totals.refused > 50


@pytest.mark.parametrize("most", [-1, 64, 2.5, True, "many"])
def test_what_is_no_number_of_guesses_is_refused(guessing: InternVL, most: Any) -> None:
    with pytest.raises(UsageError, match="speculate is"):
        guessing.generate("Hello", sampling={"speculate": most})


@pytest.mark.parametrize("language", ["int4", "int8"])
def test_a_few_rows_are_computed_as_one(tmp_path: Path, language: Any) -> None:
    """To the last bit, by our own kernels: no answer depends on what was guessed."""
    bundle = export_bundle(
        GOLDEN / "model", tmp_path / "bundle", language=language, sensitivity=False
    )
    model = load_eager(bundle)
    engine = model.engine
    if "own attention" not in engine.backend.description:
        pytest.skip("our own kernels cannot be had")
    ids = np.random.default_rng(1).integers(1, 500, 60).tolist()
    sequence = TokenSequence.build([one for one in ids if one != model.context_id], -1, [])
    single, few = engine.backend.new_cache(80), engine.backend.new_cache(80)
    engine.prefill(single, sequence)
    engine.prefill(few, sequence)
    for rows in range(2, Sampling().speculate + 2):
        tokens = ids[:rows]
        wanted = [engine.decode(single, token) for token in tokens]
        ((*found,),) = engine.run([engine.following(few, tokens, 0)])
        np.testing.assert_array_equal([one.logits for one in found], wanted)


def test_what_was_answered_before_is_guessed(golden_bundle: Path) -> None:
    """Unless it was to be told token by token; the answer stays the same."""
    model = load_eager(golden_bundle)
    asked = {"max_new_tokens": 24, "ignore_eos": True}
    plain = model.generate("Hello", sampling=PLAIN, **asked)
    first, again = (model.generate("Hello", **asked) for _ in range(2))
    assert plain.token_ids == first.token_ids == again.token_ids
    assert first.timings.accepted_tokens < 8
    assert again.timings.drafted_tokens == again.timings.accepted_tokens == 16
