"""Prefill and decode: the two phases of generation, over any backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import ContextError, PromptError
from internvl_edge.bundle.remedies import Remedy, without_gains
from internvl_edge.bundle.rope import rope_base
from internvl_edge.bundle.specs import LanguageSpec, ModelSpec
from internvl_edge.runtime.backends import Backend, Cache, SelectingBackend, Slice
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.decoding.reuse import PrefixStore
from internvl_edge.runtime.decoding.sampling import Candidates

#: Most tokens of one prefill pass: bounds the activations of the MLP (512 x 16,384 x 4 = 34 MB).
MAX_CHUNK = 512
#: Bound on the attention scores of a prefill pass (heads * tokens * keys * 4 bytes), in bytes.
SCORE_BYTES = 256 << 20
#: Bound on the widest activation of a vision pass (tiles * tokens * mlp * 4 bytes), in bytes: one
#: tile of InternViT-6B. More at a time is not faster (two: 154 ms a tile and layer, one: 130).
VISION_BYTES = 64 << 20


class PromptImage(Protocol):
    """An image of a prompt: how many rows it takes, and the rows once it is encoded."""

    @property
    def signatures(self) -> NDArray[np.int64]:
        """Negative numbers `(rows,)` that name the image and the row; see `CacheState`."""

    @property
    def rows(self) -> NDArray[np.floating]:
        """Float `(tiles * tokens_per_tile, hidden)`."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class EncodedImage:
    """One image in the language model's width; see `PromptImage`."""

    rows: NDArray[np.floating]
    signatures: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class TokenSequence:
    """A prompt as the decoder sees it.

    Attributes:
        ids: int64 `(tokens,)`, image slots holding the context token's id.
        signatures: int64 `(tokens,)`: the ids, with image slots replaced by their rows'.
        slots: int64 `(image rows,)`, positions of the image slots in order.
        images: whose rows belong into the slots, in order.
    """

    ids: NDArray[np.int64]
    signatures: NDArray[np.int64]
    slots: NDArray[np.int64]
    images: Sequence[PromptImage]

    @classmethod
    def build(
        cls, ids: Sequence[int], context_id: int, images: Sequence[PromptImage]
    ) -> TokenSequence:
        """Join token ids and images.

        Raises:
            PromptError: the number of context tokens is not the number of image rows.
        """
        array = np.asarray(ids, np.int64)
        slots = np.flatnonzero(array == context_id)
        check_slots(len(slots), sum(map(len, images)))
        signatures = array.copy()
        named = [np.empty(0, np.int64), *(image.signatures for image in images)]
        signatures[slots] = np.concatenate(named)
        return cls(array, signatures, slots, images)

    def __len__(self) -> int:
        return len(self.ids)

    def needed(self, start: int) -> list[tuple[int, int]]:
        """Return which images have rows from position `start` on, and the first such row of each:
        indices of `images` and of rows."""
        first = int(np.searchsorted(self.slots, start))
        found, offset = [], 0
        for index, image in enumerate(self.images):
            end = offset + len(image)
            if end > first:
                found.append((index, max(0, first - offset)))
            offset = end
        return found

    def image_rows(self, start: int) -> ImageRows:
        """Rows of the slots from position `start` on. Images that lie before are not asked."""
        first = int(np.searchsorted(self.slots, start))
        parts = [self.images[index].rows[row:] for index, row in self.needed(start)]
        return ImageRows(self.slots[first:], parts)


class ImageRows:
    """The rows that go into some slots `(image rows,)`, in order, from one or many arrays."""

    def __init__(self, slots: NDArray[np.int64], parts: Sequence[NDArray[np.floating]]) -> None:
        self._slots, self._parts = slots, parts
        #: Rows before each part, and in all.
        self._offsets = np.cumsum([0, *map(len, parts)])

    def put(self, target: NDArray[np.floating], start: int) -> None:
        """Write the rows whose slots lie in `target`, the positions from `start` on.

        Read where they are: 41 tiles of a 2B model are 86 MB.
        """
        first, last = np.searchsorted(self._slots, [start, start + len(target)])
        for part, offset in zip(self._parts, self._offsets, strict=False):
            begin, end = max(first, offset), min(last, offset + len(part))
            if begin < end:
                target[self._slots[begin:end] - start] = part[begin - offset : end - offset]


def shortening(language: LanguageSpec, context: int) -> dict[Remedy, str]:
    """Return what helps where a prompt does not fit a context of so many tokens."""
    most = language.max_context
    remedies = without_gains([Remedy.FEWER_IMAGES, Remedy.LOWER_TILES])
    if context < most:
        return remedies | {Remedy.RAISE_CONTEXT: ""}
    return remedies | {Remedy.LESS_TEXT: f"the model takes no more than {most}"}


def check_slots(slots: int, rows: int) -> None:
    """Raise PromptError unless the prompt has one context token per image row."""
    if slots != rows:
        raise PromptError(
            f"the prompt has {slots} <IMG_CONTEXT> tokens for {rows} image rows; remove"
            " <IMG_CONTEXT> from the text (images bring their own) or pass the missing image"
        )


def vision_batch(spec: ModelSpec) -> int:
    """Tiles of one vision pass."""
    vision = spec.vision
    widest = vision.sequence_length * vision.intermediate_size * 4
    return max(1, VISION_BYTES // max(widest, 1))


def prefill_chunk(spec: ModelSpec, total: int) -> int:
    """Tokens of one prefill pass over a prompt of `total` tokens."""
    per_token = spec.language.num_attention_heads * max(total, 1) * 4
    return max(16, min(MAX_CHUNK, SCORE_BYTES // per_token))


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

    @property
    def tiles_at_once(self) -> int:
        """Tiles of one vision pass."""
        return vision_batch(self._spec)

    def encode_tiles(self, tiles: Any) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> `(tiles * tokens_per_tile, hidden)` in one pass."""
        rows = self.backend.encode_tiles(tiles)
        return rows.reshape(-1, self._spec.language.hidden_size)

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

    def begin(self, cache: Cache, sequence: TokenSequence) -> int:
        """Leave in `cache` what it, or another one, holds of the beginning of `sequence`.

        Returns:
            how many positions that are; at least the last one is missing.

        Raises:
            LimitError: the sequence does not fit the cache.
        """
        self._check_length(cache, len(sequence))
        base = rope_base(self._spec.language, len(sequence))
        # The last token is always run: its logits are not in the cache.
        shared = self._prefixes.fill(cache, sequence.signatures, base)
        reused = min(shared, len(sequence) - 1)
        with cache.state.lock:
            cache.state.truncate(reused)
        return reused

    def prefill_chunks(
        self, cache: Cache, sequence: TokenSequence, start: int
    ) -> Iterator[NDArray[np.float32]]:
        """Append positions `start` to the end of `sequence`, a pass each time; its images from
        there on must be encoded.

        Yields:
            logits of the last position of the pass `(vocab,)`.
        """
        base = rope_base(self._spec.language, len(sequence))
        images = sequence.image_rows(start)
        for begin, stop in self._chunks(start, len(sequence)):
            last = np.array([stop - begin - 1])
            yield self._forward(cache, sequence, images, begin, stop, base, last)[0]

    def forget(self, cache: Cache) -> None:
        """Empty a cache that holds values which are no numbers."""
        with cache.state.lock:
            cache.state.truncate(0)
            cache.clear()

    def decode(self, cache: Cache, token: int) -> NDArray[np.float32]:
        """Append one token; return the logits `(vocab,)` that choose the next."""
        return np.asarray(self._append(self._next(cache, token), np.array([token]))[0])

    def decode_candidates(self, cache: Cache, token: int, count: int) -> Candidates:
        """Append one token; return at least the `count` largest logits; `count` 0: all of them."""
        # Not isinstance, which looks for a protocol's attributes one by one, for each token.
        if count == 0 or not hasattr(self.backend, "forward_candidates"):
            return Candidates(self.decode(cache, token))
        new = self._next(cache, token)
        with cache.state.lock:
            cache.state.reserve(1)
            found = cast(SelectingBackend, self.backend).forward_candidates([new], count)
            cache.state.extend(np.array([token]), new.rope_theta)
        return found[0]

    def _next(self, cache: Cache, token: int) -> Slice:
        """A token behind the cached ones."""
        total = cache.state.length + 1
        self._check_length(cache, total)
        rows = self._embedding.rows(np.array([token]))
        return Slice(cache, rows, rope_base(self._spec.language, total), np.zeros(1, np.int64))

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
            logits = self._forward(cache, sequence, images, begin, stop, base, rows)
            if stop > start:
                yield logits

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = prefill_chunk(self._spec, stop)
        while start < stop:
            yield start, min(start + size, stop)
            start += size

    def _forward(
        self,
        cache: Cache,
        sequence: TokenSequence,
        images: ImageRows,
        start: int,
        stop: int,
        base: float,
        logit_rows: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        rows = self._embedding.rows(sequence.ids[start:stop])
        images.put(rows, start)
        return self._append(Slice(cache, rows, base, logit_rows), sequence.signatures[start:stop])

    def _append(self, new: Slice, signatures: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run rows behind the cached ones and record them. Others may copy in between, not now."""
        state = new.cache.state
        with state.lock:
            state.reserve(len(new.rows))
            logits = self.backend.forward([new])
            state.extend(signatures, new.rope_theta)
        return logits

    def _check_length(self, cache: Cache, length: int) -> None:
        if length > cache.state.capacity:
            raise ContextError(
                f"{length} tokens > {cache.state.capacity} the KV cache holds",
                shortening(self._spec.language, cache.state.capacity),
            )
