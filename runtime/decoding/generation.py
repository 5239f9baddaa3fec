"""The generate loop: prefill, decode, yield; with stop strings, timings and cancellation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from internvl_edge.bundle.tokenizer import TextStream, Tokenizer
from internvl_edge.runtime.decoding.passes import Cancelled
from internvl_edge.runtime.process import NotCopied

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Timings:
    """Where the time went. Seconds on a monotonic clock; the start is the call to `stream`.

    Attributes:
        preprocess_s: decoding and tiling the images.
        vision_s: vision graph, projector included; 0 when every image came from the cache.
        prefill_s: language graph over the new part of the prompt.
        token_s: for each generated token, seconds from the start to its arrival.
        tiles: tiles encoded in this call.
        prompt_tokens: length of the prompt, image rows included.
        cached_tokens: of these, how many were already in the KV cache.
    """

    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    tiles: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token; 0 when none was generated."""
        return self.token_s[0] if self.token_s else 0.0

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between successive tokens."""
        return [after - before for before, after in pairwise(self.token_s)]

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode rate over all gaps; 0 with fewer than two tokens."""
        gaps = self.itl_s
        return len(gaps) / sum(gaps) if gaps else 0.0


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    Attributes:
        text: without special tokens, cut at a stop string, stripped at both ends.
        token_ids: generated ids, the stop id included where one was generated.
        finish_reason: "stop" (stop id or stop string), "length" (max_new_tokens or the end of the
            context), "cancelled".
        timings: see `Timings`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    timings: Timings


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
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class Steps:
    """What the loop calls: the phases, bound to one cache, one prompt and one way to choose.

    Attributes:
        prefill: runs the prompt; the first token.
        decode: appends a token; the next one.
        finish: is told when the answer has ended; again, where it was interrupted.
        enter: raises where the stream may not be used.
    """

    prefill: Callable[[Timings, Callable[[], None]], int]
    decode: Callable[[int], int]
    finish: Callable[[Reply], None]
    enter: Callable[[], None]


class TokenStream(NotCopied, Iterator[str]):
    """An answer in the making: iterate over its text pieces, or `finish` it at once.

    `cancel` may be called from another thread; the answer then ends after the pass under way.
    """

    def __init__(
        self,
        steps: Steps,
        tokenizer: Tokenizer,
        timings: Timings,
        started: float,
        *,
        stop_id: int,
        stop: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self._steps = steps
        self._tokenizer = tokenizer
        self._timings = timings
        self._started = started
        self._stop_id = stop_id
        self._stops = StopStrings(stop)
        self._max_new_tokens = max_new_tokens
        self._cancelled = threading.Event()
        self._ids: list[int] = []
        self._shown: list[str] = []
        self._reason: FinishReason = "cancelled"
        self._reply: Reply | None = None
        self._failed = False
        self._pieces = self._run()

    def __next__(self) -> str:
        self._steps.enter()
        try:
            return next(self._pieces)
        except (StopIteration, KeyboardInterrupt):
            self._close()
            raise
        except Exception:
            self._failed = True
            raise

    def cancel(self) -> None:
        """Ask the loop to end; safe from any thread."""
        self._cancelled.set()

    def finish(self) -> Reply:
        """Generate what is left and return the whole reply."""
        for _ in self:
            pass
        assert self._reply is not None
        return self._reply

    def close(self) -> Reply:
        """Stop here; the reply holds what was generated so far."""
        self._steps.enter()
        self._pieces.close()
        return self._close()

    @property
    def reply(self) -> Reply | None:
        """The reply once the answer has ended, else None."""
        return self._reply

    def _run(self) -> Generator[str, None, None]:
        text = TextStream(self._tokenizer)
        try:
            token = self._steps.prefill(self._timings, self._check)
            while True:
                self._timings.token_s.append(time.perf_counter() - self._started)
                self._ids.append(token)
                if token == self._stop_id:
                    self._reason = "stop"
                    break
                if piece := self._stops.push(text.push(token)):
                    self._shown.append(piece)
                    yield piece
                if self._stops.hit or len(self._ids) == self._max_new_tokens:
                    self._reason = "stop" if self._stops.hit else "length"
                    break
                self._check()
                token = self._steps.decode(token)
        except Cancelled:
            self._reason = "cancelled"
        if not self._stops.hit and (rest := self._flush(text)):
            self._shown.append(rest)
            yield rest

    def _flush(self, text: TextStream) -> str:
        """What was held back for incomplete UTF-8 or a possible stop string."""
        rest = self._stops.push(text.finish())
        if self._stops.hit:
            self._reason = "stop"
            return rest
        return rest + self._stops.finish()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def _close(self) -> Reply:
        if self._reply is None:
            text = "".join(self._shown).strip()
            reply = Reply(text, self._ids, self._reason, self._timings)
            if not self._failed:
                self._steps.finish(reply)
            self._reply = reply  # last: an end that was interrupted is ended again
        return self._reply


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
