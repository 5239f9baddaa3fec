"""Prefill and decode: the two phases of generation, over any backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import ContextError
from internvl_edge.bundle.remedies import Remedy, without_gains
from internvl_edge.bundle.rope import rope_base
from internvl_edge.bundle.specs import LanguageSpec, ModelSpec
from internvl_edge.kernels.operators.turns import Turns
from internvl_edge.runtime.backends import Backend, Cache, SelectingBackend, Slice, SlottedBackend
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.decoding.reuse import PrefixStore
from internvl_edge.runtime.decoding.sampling import Candidates
from internvl_edge.runtime.decoding.sequence import ImageRows, TokenSequence
from internvl_edge.runtime.decoding.speculation import Experience

T = TypeVar("T")

#: Most tokens of one prefill pass: bounds the activations of the MLP (512 x 16,384 x 4 = 34 MB).
MAX_CHUNK = 512
#: Fewest, however many keys they see.
LEAST_CHUNK = 16
#: Bound on the attention scores of a prefill pass (heads * tokens * keys * 4 bytes), in bytes, if
#: they are held.
SCORE_BYTES = 256 << 20
#: Bound on the widest activation of a vision pass (tiles * tokens * mlp * 4 bytes), in bytes: one
#: tile of InternViT-6B. More at a time is not faster (two: 154 ms a tile and layer, one: 130).
VISION_BYTES = 64 << 20


def shortening(language: LanguageSpec, context: int) -> dict[Remedy, str]:
    """Return what helps where a prompt does not fit a context of so many tokens."""
    most = language.max_context
    remedies = without_gains([Remedy.FEWER_IMAGES, Remedy.LOWER_TILES])
    if context < most:
        return remedies | {Remedy.RAISE_CONTEXT: ""}
    return remedies | {Remedy.LESS_TEXT: f"the model takes no more than {most}"}


def vision_batch(spec: ModelSpec) -> int:
    """Tiles of one vision pass."""
    vision = spec.vision
    widest = vision.sequence_length * vision.intermediate_size * 4
    return max(1, VISION_BYTES // max(widest, 1))


def prefill_chunk(spec: ModelSpec, total: int, *, scores: bool) -> int:
    """Tokens of one prefill pass over a prompt of `total` tokens.

    Args:
        scores: see `Backend.holds_scores`.
    """
    if not scores:
        return MAX_CHUNK
    return max(LEAST_CHUNK, min(MAX_CHUNK, SCORE_BYTES // _row_scores(spec, total)))


def scores_of_pass(spec: ModelSpec, total: int) -> int:
    """Most bytes of the attention scores of a pass, where they are held."""
    row = _row_scores(spec, total)
    return max(LEAST_CHUNK * row, min(SCORE_BYTES, MAX_CHUNK * row))


def _row_scores(spec: ModelSpec, total: int) -> int:
    """Bytes of the scores of one row of a layer with `total` keys."""
    return spec.language.num_attention_heads * max(total, 1) * 4


@dataclass(frozen=True)
class Run:
    """New positions of one sequence: what it brings to a pass.

    Attributes:
        cache: they are appended to what it holds.
        ids: int64 `(tokens,)`, image slots holding the context token's id.
        signatures: int64 `(tokens,)`; see `TokenSequence`.
        base: rotary base of the new positions.
        logit_rows: int64 `(n,)`, which of the new positions want logits.
        count: how many of the largest logits each of these wants at least; 0: all.
        images: rows of the image slots among them; None: there are none.
    """

    cache: Cache
    ids: NDArray[np.int64]
    signatures: NDArray[np.int64]
    base: float
    logit_rows: NDArray[np.int64]
    count: int = 0
    images: ImageRows | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Engine:
    """Runs sequences through a backend, chunk by chunk, into a KV cache.

    Args:
        backend: see `Backend`.
        spec: the model.
        embedding: see `EmbeddingTable`.
        prefixes: earlier caches to begin from.
    """

    def __init__(
        self,
        backend: Backend,
        spec: ModelSpec,
        embedding: EmbeddingTable,
        prefixes: PrefixStore,
    ) -> None:
        self.backend = backend
        self._spec = spec
        self._embedding = embedding
        self._prefixes = prefixes
        #: What guessing ahead gives, for all answers.
        self.experience = Experience(spec.language.vocab_size)

    @property
    def tiles_at_once(self) -> int:
        """Tiles of one vision pass."""
        return vision_batch(self._spec)

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> `(tiles * tokens_per_tile, hidden)` in one pass."""
        rows = self.backend.encode_tiles(tiles)
        return rows.reshape(-1, self._spec.language.hidden_size)

    @property
    def turns(self) -> Turns | None:
        """See `Backend.turns`."""
        return self.backend.turns

    @property
    def most_runs(self) -> int:
        """Sequences that one pass takes."""
        return self.backend.most_slices

    @property
    def most_tokens(self) -> int:
        """Tokens of one prefill pass, where the prompt is short."""
        return MAX_CHUNK

    def new_cache(self, capacity: int) -> Cache:
        """Allocate a cache; a kept one gives up its place where this one shares passes by that."""
        if isinstance(self.backend, SlottedBackend):
            self._prefixes.make_room(self.backend.is_in_way)
        return self.backend.new_cache(capacity)

    def run(self, runs: Sequence[Run]) -> list[list[Candidates]]:
        """Append the positions of every run to its cache, in one pass.

        Args:
            runs: at most `most_runs`, each of another cache.

        Returns:
            for each run, and in it for each row of `logit_rows`, the tokens to choose from.

        Raises:
            LimitError: a cache is full. No cache has changed.
        """
        return self._append(runs, lambda slices: self._candidates(slices, runs))

    def prefill(self, cache: Cache, sequence: TokenSequence) -> tuple[NDArray[np.float32], int]:
        """Bring `cache` to exactly `sequence`, all at once; see `begin` and `prefill_chunks`.

        Returns:
            logits of the last position `(vocab,)`, and how many tokens were reused.

        Raises:
            ContextError: the sequence does not fit the cache.
        """
        reused = self.begin(cache, sequence)
        (logits,) = deque(self.prefill_chunks(cache, sequence, reused), maxlen=1)
        return logits, reused

    def begin(self, cache: Cache, sequence: TokenSequence, beside: Sequence[Cache] = ()) -> int:
        """Leave in `cache` what it, or another one, holds of the beginning of `sequence`.

        Args:
            beside: caches of answers under way, which may begin alike.

        Returns:
            how many positions that are; at least the last one is missing.

        Raises:
            LimitError: the sequence does not fit the cache.
        """
        self._check_length(cache, len(sequence))
        base, prompt = self.base(sequence), len(sequence) - sequence.answered
        alike = len(sequence) if self._base(len(sequence) - 1, prompt) == base else prompt
        # The last token is always run: its logits are not in the cache.
        shared = self._prefixes.fill(cache, sequence.signatures[:alike], base, beside)
        reused = min(shared, len(sequence) - 1)
        with cache.state.lock:
            cache.state.truncate(reused)
        return reused

    def base(self, sequence: TokenSequence) -> float:
        """Rotary base of a prompt."""
        return self._base(0, len(sequence) - sequence.answered)

    def chunk(self, cache: Cache, sequence: TokenSequence, images: ImageRows, most: int) -> Run:
        """Return the positions of `sequence` behind those that `cache` has of it: at most `most`,
        all under one rotary base, of which the last one wants its logits."""
        start, prompt = cache.state.length, len(sequence) - sequence.answered
        stop = min(start + most, start + self.chunk_tokens(sequence), len(sequence))
        base = self._base(start, prompt)
        if self._base(stop - 1, prompt) != base:
            stop = max(prompt, start + 1)
        ids, signatures = sequence.ids[start:stop], sequence.signatures[start:stop]
        return Run(cache, ids, signatures, base, np.array([stop - start - 1]), images=images)

    def chunk_tokens(self, sequence: TokenSequence) -> int:
        """Tokens of one prefill pass over `sequence`."""
        return self._chunk(len(sequence))

    def prefill_chunks(
        self, cache: Cache, sequence: TokenSequence, start: int
    ) -> Iterator[NDArray[np.float32]]:
        """Append positions `start` to the end of `sequence`, a pass each time; its images from
        there on must be encoded.

        Yields:
            logits of the last position of the pass `(vocab,)`.
        """
        images = sequence.image_rows(start)
        while cache.state.length < len(sequence):
            ((found,),) = self.run([self.chunk(cache, sequence, images, len(sequence))])
            yield found.logits

    def forget(self, cache: Cache) -> None:
        """Empty a cache that holds values which are no numbers."""
        with cache.state.lock:
            cache.state.truncate(0)
            cache.clear()

    def decode(self, cache: Cache, token: int) -> NDArray[np.float32]:
        """Append one token; return the logits `(vocab,)` that choose the next."""
        return self.decode_candidates(cache, token, 0).logits

    def decode_candidates(self, cache: Cache, token: int, count: int) -> Candidates:
        """Append one token; return at least the `count` largest logits; `count` 0: all of them."""
        ((found,),) = self.run([self.following(cache, [token], count)])
        return found

    def following(self, cache: Cache, tokens: Sequence[int], count: int) -> Run:
        """Tokens behind the cached ones, each of which wants at least the `count` largest logits.

        Beyond the trained context every position has a rotary base of its own: there, one token.
        """
        ids = np.array(tokens, np.int64)
        base = rope_base(self._spec.language, cache.state.length + len(ids))
        return Run(cache, ids, ids, base, np.arange(len(ids)), count)

    def room_to_guess(self, cache: Cache, most: int) -> int:
        """Return how many tokens, up to `most`, may be guessed behind the next one: as the cache
        has room for, where all are rotated as they would be one by one."""
        total = cache.state.length + 1
        room = max(min(most, cache.state.capacity - total), 0)
        language = self._spec.language
        return room if rope_base(language, total) == rope_base(language, total + room) else 0

    def logits(self, sequence: TokenSequence) -> NDArray[np.float32]:
        """Logits of every position, `(tokens, vocab)`."""
        return np.concatenate(list(self.logit_chunks(sequence)))

    def logit_chunks(
        self, sequence: TokenSequence, start: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        """Logits from position `start` on, `(rows, vocab)` a prefill pass, in a cache of their own.

        A pass before `start` computes one row, which is dropped.
        """
        cache = self.backend.new_cache(len(sequence))
        base = rope_base(self._spec.language, len(sequence))
        images = sequence.image_rows(0)
        for begin, stop in self._chunks(0, len(sequence)):
            first = min(max(start - begin, 0), stop - begin - 1)
            rows = np.arange(first, stop - begin)
            ids, signatures = sequence.ids[begin:stop], sequence.signatures[begin:stop]
            run = Run(cache, ids, signatures, base, rows, images=images)
            logits = self._append([run], self.backend.forward)
            if stop > start:
                yield logits

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = self._chunk(stop)
        while start < stop:
            yield start, min(start + size, stop)
            start += size

    def _chunk(self, total: int) -> int:
        """Tokens of one prefill pass that ends at `total`, or before."""
        return prefill_chunk(self._spec, total, scores=self.backend.holds_scores)

    def _append(self, runs: Sequence[Run], forward: Callable[[Sequence[Slice]], T]) -> T:
        """Run rows behind the cached ones and record them."""
        slices = [self._slice(run) for run in runs]

        def append() -> T:
            for run in runs:
                run.cache.state.reserve(len(run))
            found = forward(slices)
            for run in runs:
                run.cache.state.extend(run.signatures, run.base)
            return found

        # Others may copy from a cache between passes, not now.
        return _holding([run.cache for run in runs], append)

    def _base(self, position: int, prompt: int) -> float:
        """Rotary base of a position behind, or in, a prompt of so many tokens."""
        return rope_base(self._spec.language, max(position + 1, prompt))

    def _slice(self, run: Run) -> Slice:
        start = run.cache.state.length
        self._check_length(run.cache, start + len(run))
        rows = self._embedding.rows(run.ids)
        if run.images is not None:
            run.images.put(rows, start)
        return Slice(run.cache, rows, run.base, run.logit_rows)

    def _candidates(self, slices: Sequence[Slice], runs: Sequence[Run]) -> list[list[Candidates]]:
        most = max(run.count for run in runs)
        if all(run.count and len(run) == 1 for run in runs) and hasattr(
            # Not isinstance, which looks for a protocol's attributes one by one, for each token.
            self.backend,
            "forward_candidates",
        ):
            selecting = cast(SelectingBackend, self.backend)
            return [[found] for found in selecting.forward_candidates(slices, most)]
        rows = iter(self.backend.forward(slices))
        return [[Candidates(next(rows)) for _ in run.logit_rows] for run in runs]

    def _check_length(self, cache: Cache, length: int) -> None:
        if length > cache.state.capacity:
            raise ContextError(
                f"{length} tokens > {cache.state.capacity} the KV cache holds",
                shortening(self._spec.language, cache.state.capacity),
            )


def _holding(caches: Sequence[Cache], act: Callable[[], T]) -> T:
    """Act while all these caches are locked. They are taken in one order everywhere, so that
    nobody waits for ever; by `with` alone, so that an interrupt leaves none of them locked."""
    if not caches:
        return act()
    first, *others = sorted(caches, key=id) if len(caches) > 1 else caches
    with first.state.lock:
        return _holding(others, act)
