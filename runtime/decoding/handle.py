"""A request on its way to an answer: its tokens, its text so far, where it stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from internvl_edge.bundle.text_form import TextForm
from internvl_edge.bundle.text_stream import TextStream
from internvl_edge.bundle.tokenizer import Tokenizer
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.boxes import Box, read_boxes
from internvl_edge.runtime.decoding.prefill import Prefill
from internvl_edge.runtime.decoding.request import Event, FinishReason, Reply, Request
from internvl_edge.runtime.decoding.reservations import Claimant
from internvl_edge.runtime.decoding.sampling import Sampler
from internvl_edge.runtime.decoding.speculation import Others, Speculator
from internvl_edge.runtime.decoding.thinking import Thoughts, overlap, part_thoughts


class StopStrings:
    """Cuts a text that arrives in pieces at the first of several stop strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """Add text; return what can no longer be part of a stop string."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class Handle(Claimant):
    """A request that a scheduler has taken.

    Args:
        request: what is asked.
        prompt_ids: its tokens, as they were checked.
        sampler: chooses the answer's tokens.
        tokenizer: makes text of them.
        limit: most tokens of the answer.
        wake: called when it is cancelled.
        speculator: guesses tokens ahead; None: nobody does.

    Attributes:
        ids: tokens generated so far.
        cache: where its positions are; None while it waits.
        had: positions that a conversation's cache held before.
        cancelled: whether the end was asked for.
        prefill: its prompt, while it is under way and not read yet.
        reserved: positions of the cache that it may fill.
        reply: the answer once it has ended, else None.
        error: what ended it instead.
    """

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        sampler: Sampler,
        tokenizer: Tokenizer,
        limit: int,
        wake: Callable[[], object],
        speculator: Speculator | None = None,
    ) -> None:
        self.request, self.prompt_ids = request, prompt_ids
        self.cache: Cache | None = None
        self.had = 0 if request.cache is None else request.cache.state.length
        self.cancelled = False
        self.prefill: Prefill | None = None
        self.reserved = 0
        self.sampler = sampler
        self.ids: list[int] = []
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self._limit = limit
        self._speculator = speculator
        self._stop_ids = frozenset(() if request.ignore_eos else request.stop_ids)
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, request.form)
        self._stops = StopStrings(request.stop)
        self._thoughts = Thoughts() if request.thinking else None
        self._shown: list[str] = []
        self._wake = wake

    @property
    def positions(self) -> int:
        """Most positions that the prompt and its answer take."""
        return len(self.prompt_ids) + self._limit - 1

    def cancel(self) -> None:
        """Ask for the end of the answer; safe from anywhere, see `Waking`."""
        self.cancelled = True
        self._wake()

    @property
    def alive(self) -> bool:
        """Whether there is something left to do."""
        return self.reply is None and not self.failed

    @property
    def failed(self) -> bool:
        """Whether an error ended it."""
        return self.error is not None

    def fail(self, error: Exception) -> None:
        """Note what ended it, and let go of what its prompt needed."""
        self.error = error
        self.let_go()

    def let_go(self) -> None:
        """Give up the cache, and what the prompt needs."""
        prefill, self.prefill, self.cache = self.prefill, None, None
        if prefill is not None:
            prefill.close()

    def guesses(self, room: int, others: Others) -> list[int]:
        """Return what to guess behind the last token, at most `room` tokens; see `Speculator`."""
        if self._speculator is None:
            return []
        return self._speculator.draft(self.ids, min(room, self._limit - len(self.ids) - 1), others)

    def verified(self, drafted: int, accepted: int, tokens: int) -> None:
        """Note how many of the tokens guessed were right, and how many the pass gave in all."""
        if drafted and self._speculator is not None:
            self.request.timings.drafted_tokens += drafted
            self.request.timings.accepted_tokens += accepted
            self._speculator.resolved(tokens)

    def learn(self) -> None:
        """Let later answers be guessed from this one; see `Speculator`."""
        if self._speculator is not None:
            self._speculator.ended(self.ids)

    def take(self, token: int, logprob: float | None) -> Event:
        """Add a token; say what it made of the text, and whether it is the last."""
        request = self.request
        request.timings.token_s.append(time.perf_counter() - request.started)
        self.ids.append(token)
        if token in self._stop_ids:
            return self.last("stop", token, logprob)
        piece = self._stops.push(self._text.push(token))
        if self._stops.hit:
            return self._event(token, piece, logprob, "stop")
        if len(self.ids) == self._limit:
            return self.last("length", token, logprob, piece)
        return self._event(token, piece, logprob, None)

    def last(
        self,
        finish: FinishReason,
        token: int | None = None,
        logprob: float | None = None,
        piece: str = "",
    ) -> Event:
        """End the text: with what was held back for incomplete UTF-8 or a possible stop string."""
        rest = self._stops.push(self._text.finish())
        if self._stops.hit:
            finish = "stop"
        return self._event(token, piece + rest + self._stops.finish(), logprob, finish)

    def replied(self, finish: FinishReason) -> Reply:
        """Return the answer as it now stands."""
        whole = "".join(self._shown).strip()
        thinking, text = ("", whole) if self._thoughts is None else part_thoughts(whole)
        timings = self.request.timings
        return Reply(text, self.ids, finish, timings, self._boxes(), thinking, whole)

    def _boxes(self) -> list[Box]:
        if not self.request.images:
            return []
        written = self._tokenizer.decode(self.ids, TextForm(skip_special_tokens=False))
        return read_boxes(written, self.request.images[-1].size)

    def _event(
        self, token: int | None, piece: str, logprob: float | None, finish: FinishReason | None
    ) -> Event:
        if piece:
            self._shown.append(piece)
        thought = ""
        if self._thoughts is not None:
            thought, piece = self._thoughts.push(piece)
            if finish is not None:
                thought += self._thoughts.finish()
        return Event(self.request, token, piece, logprob, finish, thought)
