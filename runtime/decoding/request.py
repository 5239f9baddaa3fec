"""What is asked of the scheduler, what it tells meanwhile, and what is answered."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from internvl_edge.bundle.text_form import TextForm
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.decoding.boxes import Box
from internvl_edge.runtime.decoding.progress import Progress, ProgressCallback, Stage
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.images.identity import TiledImage

#: Of an answer, unless told otherwise.
MAX_NEW_TOKENS = 1024

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
        drafted_tokens: tokens guessed ahead; see `Sampling.speculate`.
        accepted_tokens: of these, how many were right.
    """

    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    tiles: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

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


@dataclass(frozen=True, eq=False)
class Request:
    """One answer that is asked for, and all that belongs to it.

    Attributes:
        ids: token ids of the whole prompt, image slots expanded.
        stop_ids: tokens that end the answer.
        images: of the prompt, in the order of their slots.
        max_new_tokens, sampling, stop, ignore_eos: see `AnswerOptions`.
        form: how its tokens become text.
        logprobs: whether each event has the token's log-probability.
        thinking: whether reasoning before the answer is told apart from it.
        cache: a conversation's, whose beginning is reused, for one request at a time; None
            allocates one.
        progress: called between the passes of the prompt.
        timings: filled on the way.
        started: what times are counted from, on `time.perf_counter`.
        priority: requests of a larger one begin earlier; see `Policy.aging_s`.
    """

    ids: Sequence[int]
    stop_ids: Collection[int]
    images: Sequence[TiledImage] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    form: TextForm = field(default_factory=TextForm)
    logprobs: bool = False
    thinking: bool = False
    cache: Cache | None = None
    progress: ProgressCallback | None = None
    timings: Timings = field(default_factory=Timings)
    started: float = field(default_factory=time.perf_counter)
    priority: int = 0

    def tell(self, stage: Stage, done: int, total: int) -> None:
        """Say how far the prompt is."""
        if self.progress is not None:
            self.progress(Progress(stage, done, total))


@dataclass(frozen=True)
class Event:
    """What became of a request in a step.

    Attributes:
        request: whose event it is.
        token: id of the token that was generated; None where the answer only ended.
        piece: text that is now certain; may be empty.
        logprob: natural logarithm of the token's probability, before temperature and filters;
            None unless the request asks for it.
        finish: why the answer ended; None while it goes on.
        thought: likewise text, of the reasoning before the answer; see `Request.thinking`.
    """

    request: Request
    token: int | None
    piece: str
    logprob: float | None = None
    finish: FinishReason | None = None
    thought: str = ""


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    Attributes:
        text: cut at a stop string, stripped at both ends.
        token_ids: generated ids, the stop id included where one was generated.
        finish_reason: "stop" (stop id or stop string), "length" (max_new_tokens or the end of the
            context), "cancelled".
        timings: see `Timings`.
        boxes: places the answer names, in pixels of the picture shown last; see `read_boxes`.
        thinking: the reasoning before the answer, where it was asked for; without `</think>` in
            what was generated, all is reasoning, and `text` is empty.
        whole: the text as it was generated, reasoning and its marks included.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    boxes: list[Box] = field(default_factory=list)
    thinking: str = ""
    whole: str = ""
