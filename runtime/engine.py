"""Prefill and decode: the two phases of generation, over any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_edge.runtime.backends import Backend, Cache
from internvl_edge.runtime.embedding import EmbeddingTable
from internvl_edge.runtime.errors import LimitError, PromptError
from internvl_edge.runtime.rope import rope_base
from internvl_edge.runtime.specs import ModelSpec

#: Most tokens of one prefill pass: bounds the activations of the MLP (512 x 16,384 x 4 = 34 MB).
MAX_CHUNK = 512
#: Bound on the attention scores of a prefill pass (heads * tokens * keys * 4 bytes), in bytes.
SCORE_BYTES = 256 << 20
#: Bound on the widest activation of a vision pass (tiles * tokens * mlp * 4 bytes), in bytes.
VISION_BYTES = 256 << 20


class Cancelled(Exception):
    """Raised inside a phase when the caller asked to stop; never leaves the runtime."""


@dataclass(frozen=True)
class EncodedImage:
    """One image in the language model's width.

    Attributes:
        rows: float `(tiles * tokens_per_tile, hidden)`.
        signature: negative number derived from the image's content; see `CacheState`.
    """

    rows: NDArray[np.floating]
    signature: int


@dataclass(frozen=True)
class TokenSequence:
    """A prompt as the decoder sees it.

    Attributes:
        ids: int64 `(tokens,)`, image slots holding the context token's id.
        signatures: int64 `(tokens,)`: the ids, with image slots replaced by image signatures.
        slots: int64 `(image rows,)`, positions of the image slots in order.
        image_rows: float `(image rows, hidden)`.
    """

    ids: NDArray[np.int64]
    signatures: NDArray[np.int64]
    slots: NDArray[np.int64]
    image_rows: NDArray[np.floating]

    @classmethod
    def build(
        cls, ids: Sequence[int], context_id: int, images: Sequence[EncodedImage], hidden: int
    ) -> TokenSequence:
        """Join token ids and encoded images.

        Raises:
            PromptError: the number of context tokens is not the number of image rows.
        """
        array = np.asarray(ids, np.int64)
        slots = np.flatnonzero(array == context_id)
        counts = [len(image.rows) for image in images]
        check_slots(len(slots), sum(counts))
        signatures = array.copy()
        signatures[slots] = np.repeat([image.signature for image in images], counts)
        rows = [image.rows for image in images] or [np.empty((0, hidden), np.float32)]
        return cls(array, signatures, slots, np.concatenate(rows))

    def __len__(self) -> int:
        return len(self.ids)


def check_slots(slots: int, rows: int) -> None:
    """Raise PromptError unless the prompt has one context token per image row."""
    if slots != rows:
        raise PromptError(
            f"the prompt has {slots} <IMG_CONTEXT> tokens for {rows} image rows; remove"
            " <IMG_CONTEXT> from the text (images bring their own) or pass the missing image"
        )


class Engine:
    """Runs sequences through a backend, chunk by chunk, into a KV cache.

    Args:
        backend: see `Backend`.
        spec: the model.
        embedding: see `EmbeddingTable`.
    """

    def __init__(self, backend: Backend, spec: ModelSpec, embedding: EmbeddingTable) -> None:
        self.backend = backend
        self._spec = spec
        self._embedding = embedding

    def encode_tiles(
        self, tiles: NDArray[np.uint8], check: Callable[[], None]
    ) -> NDArray[np.floating]:
        """uint8 `(tiles, S, S, 3)` -> `(tiles * tokens_per_tile, hidden)`, in bounded batches."""
        vision = self._spec.vision
        widest = vision.sequence_length * vision.intermediate_size * 4
        batch = max(1, VISION_BYTES // widest)
        parts = []
        for start in range(0, len(tiles), batch):
            check()
            parts.append(self.backend.encode_tiles(tiles[start : start + batch]))
        return np.concatenate(parts).reshape(-1, self._spec.language.hidden_size)

    def prefill(
        self, cache: Cache, sequence: TokenSequence, check: Callable[[], None]
    ) -> tuple[NDArray[np.float32], int]:
        """Bring `cache` to exactly `sequence`, reusing the rows it shares with what is cached.

        Returns:
            logits of the last position `(vocab,)`, and how many tokens were reused.

        Raises:
            LimitError: the sequence does not fit the cache.
        """
        self._check_length(cache, len(sequence))
        base = rope_base(self._spec.language, len(sequence))
        # The last token is always run: its logits are not in the cache.
        reused = min(cache.state.common_prefix(sequence.signatures, base), len(sequence) - 1)
        cache.state.truncate(reused)
        logits = np.empty(0, np.float32)
        for start, stop in self._chunks(reused, len(sequence)):
            check()
            last = np.array([stop - start - 1])
            logits = self._forward(cache, sequence, start, stop, base, last)[0]
        return logits, reused

    def decode(self, cache: Cache, token: int) -> NDArray[np.float32]:
        """Append one token; return the logits `(vocab,)` that choose the next."""
        self._check_length(cache, cache.state.length + 1)
        base = rope_base(self._spec.language, cache.state.length + 1)
        ids = np.array([token])
        rows = self._embedding.rows(ids)
        logits = self.backend.forward(cache, rows, base, np.zeros(1, np.int64))
        cache.state.extend(ids, base)
        return np.asarray(logits[0])

    def logits(self, sequence: TokenSequence) -> NDArray[np.float32]:
        """Logits of every position, `(tokens, vocab)`, in a cache of their own."""
        cache = self.backend.new_cache(len(sequence))
        base = rope_base(self._spec.language, len(sequence))
        parts = [
            self._forward(cache, sequence, start, stop, base, np.arange(stop - start))
            for start, stop in self._chunks(0, len(sequence))
        ]
        return np.concatenate(parts)

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        per_token = self._spec.language.num_attention_heads * stop * 4
        size = max(16, min(MAX_CHUNK, SCORE_BYTES // per_token))
        while start < stop:
            yield start, min(start + size, stop)
            start += size

    def _forward(
        self,
        cache: Cache,
        sequence: TokenSequence,
        start: int,
        stop: int,
        base: float,
        logit_rows: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        rows = self._embedding.rows(sequence.ids[start:stop])
        first, last = np.searchsorted(sequence.slots, [start, stop])
        rows[sequence.slots[first:last] - start] = sequence.image_rows[first:last]
        logits = self.backend.forward(cache, rows, base, logit_rows)
        cache.state.extend(sequence.signatures[start:stop], base)
        return logits

    def _check_length(self, cache: Cache, length: int) -> None:
        if length > cache.state.capacity:
            raise LimitError(
                f"{length} tokens > {cache.state.capacity} the KV cache holds; shorten the prompt,"
                " use fewer tiles, or load with a larger max_context"
            )
