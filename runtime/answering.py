"""From a tokenised prompt to an answer in the making: checked, and bound to what computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import LimitError, PrecisionError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.tokenizer import Tokenizer
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.finite import FiniteCheck
from internvl_edge.runtime.decoding.generation import Reply, Steps, Timings, TokenStream
from internvl_edge.runtime.decoding.inputs import Inputs
from internvl_edge.runtime.decoding.passes import Engine, TokenSequence
from internvl_edge.runtime.decoding.reuse import ImageStore, PrefixStore
from internvl_edge.runtime.decoding.sampling import Candidates, Sampler, Sampling
from internvl_edge.runtime.images.identity import LazyImage, TiledImage
from internvl_edge.runtime.memory import MemoryGuard
from internvl_edge.runtime.process import HomeProcess


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        ids: of the whole prompt, image slots expanded.
        tiled: its images, in the order of their slots.
        max_new_tokens, sampling, stop: see `InternVL.stream`.
        stop_id: token that ends the answer.
    """

    ids: Sequence[int]
    tiled: Sequence[TiledImage]
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    stop_id: int


@dataclass(frozen=True)
class Answering:
    """What answers are made with: one for each model.

    Attributes:
        inputs: checks prompts.
        engine: runs them.
        tokenizer: makes text of tokens.
        images: rows that are kept.
        prefixes: KV caches that are kept.
        memory: refuses what would not fit; None: the device does.
        finite: refuses what is no number.
        max_context: most tokens of a prompt and its answer.
        home: the process all this is in.
    """

    inputs: Inputs
    engine: Engine
    tokenizer: Tokenizer
    images: ImageStore
    prefixes: PrefixStore
    memory: MemoryGuard | None
    finite: FiniteCheck
    max_context: int
    home: HomeProcess

    def start(
        self,
        request: Request,
        cache: Cache | None,
        *,
        timings: Timings,
        started: float,
        finish: Callable[[Reply], None] = lambda reply: None,
    ) -> TokenStream:
        """Check a request and bind the phases to it; `cache` None allocates one."""
        if request.max_new_tokens < 1:
            raise LimitError(
                f"max_new_tokens is {quoted(request.max_new_tokens)}, it must be at least 1"
            )
        ids = self.inputs.checked(request.ids, request.tiled)
        timings.prompt_tokens = len(ids)
        longest = min(len(ids) + request.max_new_tokens, self.max_context)
        if self.memory is not None:
            held = 0 if cache is None else cache.state.length
            tiles = sum(image.tiles for image in request.tiled)
            self.memory.check_prompt(max(longest - held, 0), tiles)
        if cache is None:
            needed = min(self.max_context, len(ids) + request.max_new_tokens - 1)
            cache = self.engine.backend.new_cache(needed)
        # The last token generated is never run, so it needs no place in the cache.
        room = self.max_context - len(ids) + 1
        return TokenStream(
            self._steps(request, ids, cache, finish),
            self.tokenizer,
            timings,
            started,
            stop_id=request.stop_id,
            stop=request.stop,
            max_new_tokens=min(request.max_new_tokens, room),
        )

    def _steps(
        self, request: Request, ids: list[int], cache: Cache, finish: Callable[[Reply], None]
    ) -> Steps:
        sampler = Sampler(request.sampling, self.finite.logit)

        def sample(candidates: Candidates) -> int:
            try:
                return sampler(candidates)
            except PrecisionError:
                self.engine.forget(cache)
                raise

        def prefill(timings: Timings, check: Callable[[], None]) -> int:
            sequence = self.sequence(ids, request.tiled, timings, check)
            before, vision = time.perf_counter(), timings.vision_s
            logits, timings.cached_tokens = self.engine.prefill(cache, sequence, check)
            encoding = timings.vision_s - vision
            timings.prefill_s = time.perf_counter() - before - encoding
            return sample(Candidates(logits))

        def decode(token: int) -> int:
            wanted = request.sampling.candidates
            return sample(self.engine.decode_candidates(cache, token, wanted))

        def finished(reply: Reply) -> None:
            self.prefixes.keep(cache)
            finish(reply)

        return Steps(prefill, decode, finished, self.home.check)

    def rows_of(
        self, image: TiledImage, timings: Timings, check: Callable[[], None]
    ) -> NDArray[np.floating]:
        """Rows of one image: kept from earlier, or encoded now, which enters the timings."""

        def encode() -> NDArray[np.floating]:
            before = time.perf_counter()
            rows = self.engine.encode_tiles(image.pixels(), check)
            self.finite.rows(rows)
            timings.vision_s += time.perf_counter() - before
            timings.tiles += image.tiles
            return rows

        return self.images.rows(image.identity, encode)

    def sequence(
        self,
        ids: list[int],
        tiled: Sequence[TiledImage],
        timings: Timings,
        check: Callable[[], None],
    ) -> TokenSequence:
        """Join checked ids and images, which are encoded when the engine asks for their rows."""
        images = [
            LazyImage(
                image.identity,
                self.inputs.rows(image),
                partial(self.rows_of, image, timings, check),
            )
            for image in tiled
        ]
        return TokenSequence.build(ids, self.inputs.context_id, images)
