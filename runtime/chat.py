"""Multi-turn conversation over one KV cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl_edge.bundle.errors import PromptError
from internvl_edge.bundle.prompt import IMAGE_PLACEHOLDER
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.arguments import pictures, text
from internvl_edge.runtime.decoding.generation import TokenStream
from internvl_edge.runtime.decoding.request import MAX_NEW_TOKENS, Reply, Request, Timings
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.sources import Images
from internvl_edge.runtime.messages import Messages, read_messages
from internvl_edge.runtime.process import NotCopied


@dataclass(frozen=True)
class Turn:
    """A question on its way to an answer.

    Attributes:
        number: of the turn, from 0.
        question: with its `<image>` markers.
        shown: images of the conversation, this turn's included.
        stream: the answer.
    """

    number: int
    question: str
    shown: list[TiledImage]
    stream: TokenStream


class Chat(NotCopied):
    """A conversation: each turn computes only what it adds.

    The prompt of a turn is the whole conversation, rendered and tokenised as the reference does;
    of it, the leading part that is already in the KV cache is kept. An image is encoded once, by
    the hash of its content, whenever and however often it is shown.
    """

    def __init__(
        self,
        answering: Answering,
        *,
        system_message: str | None = None,
        max_tiles: int | None = None,
        messages: Messages | None = None,
    ) -> None:
        told = read_messages(() if messages is None else messages, answering.inputs, system_message)
        self._answering = answering
        self._system_message = told.system_message
        self._max_tiles = max_tiles
        self._history = told.answered()
        self._images = told.tile(answering.inputs, max_tiles)
        for image in self._images:
            image.release()
        self._cache = answering.engine.backend.new_cache(answering.max_context)
        self._active: Turn | None = None

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions and answers of the turns that have ended; may be cut at its end."""
        self._settle()
        return self._history

    @history.setter
    def history(self, turns: list[tuple[str, str]]) -> None:
        self._settle()
        self._history = turns

    @property
    def cached_tokens(self) -> int:
        """Positions of the KV cache in use."""
        return self._cache.state.length

    def send(
        self,
        prompt: str,
        images: Images = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | Mapping[str, Any] | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
        clean_up: bool = True,
    ) -> Reply:
        """One turn, whole; see `InternVL.stream` for the arguments."""
        stream = self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            skip_special_tokens=skip_special_tokens,
            clean_up=clean_up,
        )
        reply = stream.finish()
        self._settle()
        return reply

    def stream(
        self,
        prompt: str,
        images: Images = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | Mapping[str, Any] | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
        clean_up: bool = True,
    ) -> TokenStream:
        """One turn, piece by piece. An answer still running is ended first, as it stands.

        The turn enters the history when its answer ends, cancelled ones included; a turn that
        raises an error leaves the conversation as it was.
        """
        self._answering.home.check()
        if self._active is not None:
            self._active.stream.close()
        started = time.perf_counter()
        timings = Timings()
        inputs = self._answering.inputs
        new = [inputs.tile(image, self._max_tiles) for image in pictures("images", images)]
        timings.preprocess_s = time.perf_counter() - started
        earlier = self._earlier()
        question = inputs.question(text("prompt", prompt), len(new), earlier_images=len(earlier))
        shown = [*earlier, *new]
        ids = inputs.conversation([*self.history, (question, None)], shown, self._system_message)
        request = Request.of(
            ids,
            inputs.stop_ids,
            shown,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            skip_special_tokens=skip_special_tokens,
            clean_up=clean_up,
            cache=self._cache,
            timings=timings,
            started=started,
        )
        stream = TokenStream(self._answering, request)
        self._active = Turn(len(self.history), question, shown, stream)
        return stream

    def _settle(self) -> None:
        """Put a turn that has ended into the history; where an interrupt came in between, again."""
        turn = self._active
        if turn is None or (reply := turn.stream.reply) is None:
            return
        if not turn.stream.failed:
            # The history alone says how many images count: before it is told, these are none's.
            self._images = turn.shown
            self._history[turn.number :] = [(turn.question, reply.text)]
        self._active = None

    def _earlier(self) -> list[TiledImage]:
        """Images of the turns in the history, in order."""
        count = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in self.history)
        if count > len(self._images):
            raise PromptError(
                f"the history has {count} {IMAGE_PLACEHOLDER}, {len(self._images)} images were"
                " shown in this chat; show them again"
            )
        return self._images[:count]
