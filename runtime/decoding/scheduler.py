"""Requests to tokens, a step at a time: the loop under `generate`, `stream` and `chat`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from internvl_edge.bundle.errors import PrecisionError, UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.decoding.admission import Admission
from internvl_edge.runtime.decoding.encoding import InTurn
from internvl_edge.runtime.decoding.failures import without_locals
from internvl_edge.runtime.decoding.handle import Handle
from internvl_edge.runtime.decoding.lane import Beside, VisionLane
from internvl_edge.runtime.decoding.passes import Run
from internvl_edge.runtime.decoding.policy import Pace
from internvl_edge.runtime.decoding.prefill import Prefill
from internvl_edge.runtime.decoding.request import Event, FinishReason, Request
from internvl_edge.runtime.decoding.sampling import Candidates, Sampler, log_probability
from internvl_edge.runtime.decoding.speculation import Others, Speculator
from internvl_edge.runtime.decoding.waking import Waking

#: Of a step for images: a signal is looked for in between.
LONGEST_WAIT_S = 0.5


@dataclass(frozen=True)
class Part:
    """What a handle brings to a step: positions to run, of its prompt or behind its last token."""

    handle: Handle
    run: Run


@dataclass(frozen=True)
class Work:
    """What is run in a step.

    Attributes:
        prompts, answers: pieces of prompts; tokens behind running answers.
        encoded: whether a pass over tiles came instead of prompts.
    """

    prompts: list[Part]
    answers: list[Part]
    encoded: bool

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run, because images are encoded beside."""
        return not (self.prompts or self.answers or self.encoded)

    def tell(self, pace: Pace, seconds: float) -> None:
        """Say how long it took."""
        if not self.answers or self.encoded:
            return
        if self.prompts:
            tokens = sum(len(part.run) for part in self.prompts)
            pace.prefilled(len(self.answers), tokens, seconds)
        else:
            pace.decoded(len(self.answers), seconds)


class Scheduler:
    """Runs the requests it is given, in bounded steps.

    A scheduler belongs to one thread; several may share one model. A step is one pass, or as many
    as the backend needs, over a chunk of the oldest prompt that is not done and a token of each
    running request. Where images are to be encoded, a pass over tiles comes instead of the chunk.

    Args:
        answering: what answers are made with.
        lane: encodes images beside; None: a step does, in turn with tokens.
    """

    def __init__(self, answering: Answering, lane: VisionLane | None = None) -> None:
        self._answering = answering
        self._waking = Waking()
        vision = InTurn(answering.encoder) if lane is None else Beside(lane, self._waking.wake)
        self._admission = Admission(answering, vision)
        self._pace = Pace(answering.policy.growth)
        self._events: list[Event] = []
        self._errors: list[Exception] = []
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
        handle = Handle(
            request,
            ids,
            Sampler(request.sampling, means.finite.logit),
            means.tokenizer,
            # The last token generated is never run, so it needs no place in the cache.
            limit=min(asked, means.max_context - len(ids) + 1),
            wake=self._waking.wake,
            speculator=self._speculator(request, ids),
        )
        self._admission.add(handle)
        return handle

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return len(self._admission.handles())

    def wake(self) -> None:
        """End the wait of a step for images; safe from anywhere, see `Waking`."""
        self._waking.wake()

    def step(self) -> list[Event]:
        """Do the next piece of work of each request; return what came of it.

        Raises:
            PrecisionError: a part computed values that are not finite. The request has failed; the
                others' events come with the next step.
        """
        self._advance()
        if self._errors:
            raise without_locals(self._errors.pop(0))
        return self._told()

    def advance(self) -> list[Event]:
        """Do a step; what ended requests by an error is told by their handles alone."""
        self._advance()
        while self._errors:
            without_locals(self._errors.pop(0))
        return self._told()

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _advance(self) -> None:
        self._answering.home.check()
        for handle in self._admission.handles():
            self._go_on(handle)
        self._within = True
        self._waking.forget()
        self._errors += self._admission.admit()
        work = self._work()
        with self._turn(work):
            before = self._pace.clock()
            for group in self._groups(work):
                self._pass(group)
            work.tell(self._pace, self._pace.clock() - before)
        if work.idle and self._admission.admitted and not (self._errors or self._events):
            self._waking.wait(LONGEST_WAIT_S)
        self._within = False

    @contextmanager
    def _turn(self, work: Work) -> Iterator[None]:
        """Let pictures that are encoded beside rest while answers go on."""
        turns = self._answering.engine.turns
        if turns is None or not work.answers:
            yield
            return
        self._pace.rested(turns.enter(self._pace.share))
        try:
            yield
        finally:
            turns.leave()

    def end(self, handle: Handle, finish: FinishReason = "cancelled") -> None:
        """End an answer as it stands; where an interrupt came in between, again."""
        if handle.reply is None:
            if not handle.failed:
                handle.learn()
                if handle.cache is not None:
                    self._answering.prefixes.keep(handle.cache)
                for image in handle.request.images:
                    image.release()
            handle.let_go()
            self._admission.remove(handle)
            handle.reply = handle.replied(finish)  # last: then all of it is done

    def _go_on(self, handle: Handle) -> None:
        """End what was cancelled."""
        if self._within:  # a step that an interrupt left: what it did is not known
            self.end(handle)
        elif handle.cancelled and handle.alive:
            self._record(handle, handle.last("cancelled"))

    def _work(self) -> Work:
        """Return what is run in this step."""
        self._admission.grow()
        running = [handle for handle in self._admission.admitted if handle.prefill is None]
        prompts, encoded = self._of_prompts(self._pace.chunk if running else None)
        return Work(prompts, self._of_answers(running, guessing=not prompts), encoded)

    def _of_prompts(self, chunk: int | None) -> tuple[list[Part], bool]:
        """Return the next pieces of prompts, at most so many tokens; or whether tiles were encoded
        instead."""
        engine = self._answering.engine
        left = engine.most_tokens if chunk is None else chunk
        parts: list[Part] = []
        before: list[Prefill] = []
        for handle in self._admission.prompts():
            try:
                part, encoded = self._of_prompt(handle, left, before)
            except Exception as error:  # noqa: BLE001 - raised once the others had their turn
                self.fail(handle, error)
                continue
            if encoded:
                return parts, True
            if part is not None:
                parts.append(part)
                left -= len(part.run)
                if engine.most_runs == 1 or left < 1:
                    break
        return parts, False

    def _of_prompt(
        self, handle: Handle, most: int, before: list[Prefill]
    ) -> tuple[Part | None, bool]:
        """Return the next piece of a prompt, unless it has to wait for images or for another one
        that begins alike; or whether tiles were encoded instead."""
        prefill = handle.prefill
        assert prefill is not None
        if (encoded := prefill.encode()) is not None:
            return None, encoded
        waits = any(map(prefill.follows, before))
        before.append(prefill)
        if waits:
            return None, False
        return Part(handle, prefill.run(most, self._admission.caches(handle))), False

    def _of_answers(self, running: Sequence[Handle], *, guessing: bool) -> list[Part]:
        """Return what each brings: its last token, and guesses of the next ones."""
        engine = self._answering.engine
        guessing = guessing and engine.experience.costs.may_search
        together = Others.of(min(len(running), engine.most_runs) - 1)
        parts = []
        for handle in running:
            guesses: list[int] = []
            if guessing:
                others = together if engine.most_runs > 1 else Others()
                guesses = self._guesses(handle, others)
            request, cache = handle.request, handle.cache
            wanted = 0 if request.logprobs else request.sampling.candidates
            assert cache is not None
            parts.append(Part(handle, engine.following(cache, [handle.ids[-1], *guesses], wanted)))
        return parts

    def _guesses(self, handle: Handle, others: Others) -> list[int]:
        cache = handle.cache
        assert cache is not None
        room = min(handle.reserved, handle.positions) - cache.state.length - 1
        found = handle.guesses(room, others)
        return found[: self._answering.engine.room_to_guess(cache, len(found))] if found else found

    def _groups(self, work: Work) -> Iterator[Sequence[Part]]:
        """Split what is run into passes."""
        parts, most = [*work.prompts, *work.answers], self._answering.engine.most_runs
        for start in range(0, len(parts), most):
            yield parts[start : start + most]

    def _pass(self, group: Sequence[Part]) -> None:
        """Run some parts together; where that fails, each alone, so that only one of them does."""
        before = time.perf_counter()
        try:
            found = self._answering.engine.run([part.run for part in group])
        except Exception as error:  # noqa: BLE001 - raised once the others had their turn
            if len(group) == 1:
                return self.fail(group[0].handle, error)
            for part in group:
                self._pass([part])
            return None
        seconds = time.perf_counter() - before
        if all(part.handle.prefill is None for part in group):
            rows = sum(len(part.run) for part in group)
            self._answering.engine.experience.costs.add(rows, seconds)
        for part, candidates in zip(group, found, strict=True):
            try:
                self._ran(part, candidates, seconds)
            except PrecisionError as error:
                self._answering.engine.forget(part.run.cache)
                self.fail(part.handle, error)
            except Exception as error:  # noqa: BLE001 - raised once the others had their turn
                self.fail(part.handle, error)
        return None

    def _ran(self, part: Part, found: Sequence[Candidates], seconds: float) -> None:
        """Note what was run; choose tokens where that was the end of a prompt, or an answer's."""
        handle = part.handle
        if handle.prefill is not None:
            handle.request.timings.prefill_s += seconds
            handle.prefill.ran()
            if not handle.prefill.done:
                return
            handle.prefill = None
            self._admission.read(handle)
            if handle.ids:  # it was dropped, and is where it was
                return
        self._choose(part, found)

    def _choose(self, part: Part, found: Sequence[Candidates]) -> None:
        """Choose tokens for as long as they are those that were run already; forget the others."""
        handle, run = part.handle, part.run
        ids, tokens, accepted = run.ids.tolist(), 0, 0
        for row, candidates in zip(run.logit_rows.tolist(), found, strict=True):
            try:
                event = self._chosen(handle, candidates)
            except PrecisionError:
                if not tokens:
                    raise
                self._cut(run, row)  # it is computed again, and told when its turn comes
                break
            tokens += 1
            hit = ids[row + 1 : row + 2] == [event.token]
            accepted += hit
            if event.finish is not None or not hit:
                self._cut(run, row + 1)
                self._record(handle, event)
                break
            self._record(handle, event)
        handle.verified(len(run.logit_rows) - 1, accepted, tokens)

    def _chosen(self, handle: Handle, candidates: Candidates) -> Event:
        """Choose a token, and add it to the answer."""
        token = handle.sampler(candidates)
        asked = handle.request.logprobs
        return handle.take(token, log_probability(candidates.logits, token) if asked else None)

    def _cut(self, run: Run, rows: int) -> None:
        """Leave of a run that many rows in its cache."""
        with run.cache.state.lock:
            run.cache.state.truncate(run.cache.state.length - (len(run) - rows))

    def _speculator(self, request: Request, ids: list[int]) -> Speculator | None:
        means, most = self._answering, request.sampling.speculate
        if not most or not means.engine.backend.takes_drafts:
            return None
        return Speculator(ids, means.inputs.context_id, most, means.engine.experience)

    def _record(self, handle: Handle, event: Event) -> None:
        self._events.append(event)
        if event.finish is not None:
            self.end(handle, event.finish)

    def fail(self, handle: Handle, error: Exception) -> None:
        """End a request by an error, which the step raises."""
        handle.fail(error)
        self._admission.remove(handle)
        self._errors.append(error)
