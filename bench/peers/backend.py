"""This runtime with llama.cpp as its language part: same tiles, prompts, sampling, vision graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.peers.llamacpp import LlamaCpp
from internvl_edge.bundle.errors import ContextError, UsageError
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.tokenizer import load_tokenizer
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import Backend, Cache, PlainPasses, Slice, single
from internvl_edge.runtime.backends.kv_cache import CacheState
from internvl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend


@dataclass
class LlamaCppCache:
    """llama.cpp holds one sequence, which belongs to the cache made last."""

    state: CacheState

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def held_bytes(self) -> int:
        return 0

    def trim(self) -> None:
        """There is nothing to give back."""

    def copy_rows(self, source: Cache, start: int, stop: int) -> None:
        raise ValueError("llama.cpp's cache is not shared between conversations")

    def clear(self) -> None:
        """Nothing beyond the length is read."""


class LlamaCppBackend(PlainPasses):
    """Images through `vision`, rows of embeddings through llama.cpp; see `Backend`."""

    def __init__(self, vision: Backend, language: LlamaCpp) -> None:
        self._vision = vision
        self._language = language
        self._current: LlamaCppCache | None = None

    @property
    def description(self) -> str:
        return f"llama.cpp behind {self._vision.description}"

    @property
    def most_slices(self) -> int:
        return 1

    @property
    def numerics(self) -> str:
        return self._vision.numerics

    def encode_tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.floating]:
        return self._vision.encode_tiles(tiles)

    def new_cache(self, capacity: int) -> LlamaCppCache:
        if capacity > self._language.context:
            raise ContextError(
                f"{capacity} tokens > {self._language.context} of llama.cpp's context"
            )
        self._language.reset()
        self._current = LlamaCppCache(CacheState(capacity))
        return self._current

    def forward(self, batch: Sequence[Slice]) -> NDArray[np.float32]:
        new = single(batch)
        if new.cache is not self._current:
            raise ValueError("llama.cpp holds one sequence, and another one began since")
        self._language.truncate(new.cache.state.length)
        if list(new.logit_rows) == [len(new.rows) - 1]:
            return self._language.append_rows(new.rows)
        return self._language.append_rows(new.rows, every=True)[new.logit_rows]


def load_with_llamacpp(bundle: Path, gguf: Path, threads: int, context: int) -> InternVL:
    """A float32 bundle whose language graph is replaced by a GGUF of the same checkpoint.

    Args:
        context: most tokens of a conversation; at most the trained length, beyond which the GGUF
            has no NTK scaling.
    """
    opened = open_bundle(bundle, verify="size")
    limit = opened.spec.language.max_position_embeddings
    if context > limit:
        raise UsageError(f"a context of {context} is beyond the trained length {limit}")
    backend = LlamaCppBackend(OnnxRuntimeBackend(opened, threads), LlamaCpp(gguf, threads, context))
    return InternVL(opened, backend, load_tokenizer(bundle), context, reuse_bytes=0)
