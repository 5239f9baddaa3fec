"""Requests to tokens, a step at a time: the loop under `generate`, `stream` and `chat`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import PrecisionError, UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.passes import TokenSequence
from internvl_edge.runtime.decoding.request import Event, FinishReason, Request
from internvl_edge.runtime.decoding.sampling import Candidates, Sampler, log_probability
from internvl_edge.runtime.images.identity import PendingImage


class Scheduler:
    """Runs the requests it is given, in bounded steps.

    A scheduler belongs to one thread; several may share one model. A step does one pass of the
    oldest prompt that is not done (over tiles, or over a chunk of tokens), then decodes a token of
    each running request: one after the other, because backends take batches of one so far.

    Args:
        answering: what answers are made with.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._handles: list[Handle] = []
        self._events: list[Event] = []
        self._within = False  # a step, or one that an interrupt left

    def add(self, request: Request) -> Handle:
        """Take a request.

        Raises:
            PromptError, LimitError, ProcessError: it cannot be answered; nothing was computed.
        """
        means, asked = self._answering, request.max_new_tokens
        means.home.check()
        if asked < 1:
            raise UsageError(f"is {quoted(asked)}, it must be at least 1", option="max_new_tokens")
        ids = means.inputs.checked(request.ids, request.images)
        request.timings.prompt_tokens = len(ids)
        self._check_memory(request, len(ids))
        cache = request.cache
        if cache is None:
            needed = min(means.max_context, len(ids) + asked - 1)
            cache = means.engine.backend.new_cache(needed)
        handle = Handle(
            request,
            cache,
            _prompt(means, request, cache, ids),
            Sampler(request.sampling, means.finite.logit),
            means.tokenizer,
            # The last token generated is never run, so it needs no place in the cache.
            limit=min(asked, means.max_context - len(ids) + 1),
        )
        self._handles.append(handle)
        return handle

    def step(self) -> list[Event]:
        """Do the next piece of work of each request; return what came of it.

        Raises:
            PrecisionError: a part computed values that are not finite. The request has failed; the
                others' events come with the next step.
        """
        self._answering.home.check()
        self._handles = [handle for handle in self._handles if self._goes_on(handle)]
        self._within = True
        running = [handle for handle in self._handles if handle.ids]
        prompts = [handle for handle in self._handles if not handle.ids]
        for handle in [*prompts[:1], *running]:
            try:
                self._work(handle)
            except Exception:
                handle.fail()
                self._within = False
                raise
        self._within = False
        events, self._events = self._events, []
        return events

    def end(self, handle: Handle, finish: FinishReason = "cancelled") -> None:
        """End an answer as it stands; where an interrupt came in between, again."""
        if handle.reply is None:
            if not handle.failed:
                self._answering.prefixes.keep(handle.cache)
                for image in handle.request.images:
                    image.release()
            handle.prompt = None
            handle.reply = handle.replied(finish)  # last: then all of it is done

    def _goes_on(self, handle: Handle) -> bool:
        """Whether there is something left to do, after ending what was cancelled."""
        if self._within:  # a step that an interrupt left: what it did is not known
            self.end(handle)
        elif handle.cancelled and handle.alive:
            self._record(handle, handle.last("cancelled"))
        return handle.alive

    def _work(self, handle: Handle) -> None:
        """Do a piece of the prompt, or decode a token."""
        engine, request = self._answering.engine, handle.request
        if handle.ids:
            wanted = 0 if request.logprobs else request.sampling.candidates
            candidates = engine.decode_candidates(handle.cache, handle.ids[-1], wanted)
        elif (logits := _advance(handle)) is not None:
            candidates = Candidates(logits)
        else:
            return
        try:
            token = handle.sampler(candidates)
        except PrecisionError:
            engine.forget(handle.cache)
            raise
        logprob = log_probability(candidates.logits, token) if request.logprobs else None
        self._record(handle, handle.take(token, logprob))

    def _record(self, handle: Handle, event: Event) -> None:
        self._events.append(event)
        if event.finish is not None:
            self.end(handle, event.finish)

    def _check_memory(self, request: Request, prompt_tokens: int) -> None:
        means = self._answering
        if means.memory is not None:
            longest = min(prompt_tokens + request.max_new_tokens, means.max_context)
            held = 0 if request.cache is None else request.cache.state.length
            tiles = sum(image.tiles for image in request.images)
            means.memory.check_prompt(max(longest - held, 0), tiles)


def _advance(handle: Handle) -> NDArray[np.float32] | None:
    """Do a piece of a prompt, within its timings; the logits `(vocab,)` once it is done."""
    assert handle.prompt is not None
    timings = handle.request.timings
    before, vision = time.perf_counter(), timings.vision_s
    logits = next(handle.prompt)
    timings.prefill_s += time.perf_counter() - before - (timings.vision_s - vision)
    if logits is not None:
        handle.prompt = None
    return logits


def _prompt(
    means: Answering, request: Request, cache: Cache, ids: list[int]
) -> Iterator[NDArray[np.float32] | None]:
    """Encode the images that are not in the cache, then run the tokens, a pass each time.

    Yields:
        None, and after the last pass the logits `(vocab,)` of the last position.
    """
    images = [PendingImage(image.identity, means.inputs.rows(image)) for image in request.images]
    sequence = TokenSequence.build(ids, means.inputs.context_id, images)
    reused = means.engine.begin(cache, sequence)
    request.timings.cached_tokens = reused
    yield from _encoded(means, request, images, [index for index, _ in sequence.needed(reused)])
    request.tell("prompt", reused, len(sequence))
    for logits in means.engine.prefill_chunks(cache, sequence, reused):
        request.tell("prompt", cache.state.length, len(sequence))
        yield logits if cache.state.length == len(sequence) else None


def _encoded(
    means: Answering, request: Request, images: Sequence[PendingImage], needed: Sequence[int]
) -> Iterator[None]:
    """Encode the images that are needed, a pass each time."""
    total = sum(request.images[index].tiles for index in needed)
    done = 0
    if needed:
        request.tell("tiles", done, total)
    for index in needed:
        image, before = request.images[index], request.timings.tiles
        for rows in means.encoder.steps(image, request.timings):
            if rows is None:
                request.tell("tiles", done + request.timings.tiles - before, total)
                yield None
            else:
                images[index].encoded(rows)
        done += image.tiles
        if request.timings.tiles == before:  # its rows were known
            request.tell("tiles", done, total)
