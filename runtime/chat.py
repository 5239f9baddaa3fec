"""Multi-turn conversation over one KV cache."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvl_edge.bundle.errors import ContextError, PromptError
from internvl_edge.bundle.prompt import IMAGE_PLACEHOLDER
from internvl_edge.bundle.remedies import Remedy, without_gains
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.arguments import file_path, flag, pairs_of_texts, pictures, text
from internvl_edge.runtime.asking import AnswerOptions, Started, check_names, new_tokens, request
from internvl_edge.runtime.decoding.generation import TokenStream
from internvl_edge.runtime.decoding.request import Reply, Request
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.sources import Images
from internvl_edge.runtime.messages import Messages, read_messages
from internvl_edge.runtime.process import NotCopied
from internvl_edge.runtime.stored import load, save, written

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        messages: Messages | str | os.PathLike[str] | None = None,
        control_tokens: bool = False,
        drop_oldest: bool = False,
        thinking: bool = False,
        keep_thinking: bool = True,
    ) -> None:
        said = load(messages) if isinstance(messages, str | os.PathLike) else messages
        told = read_messages(() if said is None else said, answering.inputs, system_message)
        self._answering = answering
        inputs = answering.inputs
        self._system_message = inputs.system_message(told.system_message, thinking=thinking)
        self._thinking, self._keep_thinking = thinking, keep_thinking
        self._max_tiles = max_tiles
        self._control_tokens = control_tokens
        self._drop_oldest = drop_oldest
        self._history = told.answered()
        self._images = told.tile(inputs, max_tiles)
        for image in self._images:
            image.release()
        self._cache = answering.engine.new_cache(answering.max_context)
        self._cache.state.owner = weakref.ref(self)
        self._active: Turn | None = None

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions and answers of the turns that have ended; may be cut at its end."""
        self._settle()
        return self._history

    @history.setter
    def history(self, turns: list[tuple[str, str]]) -> None:
        self._settle()
        self._history = pairs_of_texts("history", turns)

    @property
    def cached_tokens(self) -> int:
        """Positions of the KV cache in use."""
        return self._cache.state.length

    def send(self, prompt: str, images: Images = (), **options: Unpack[AnswerOptions]) -> Reply:
        """One turn, whole; see `AnswerOptions`."""
        stream = self.stream(prompt, images, **options)
        reply = stream.finish()
        self._settle()
        return reply

    def stream(
        self, prompt: str, images: Images = (), **options: Unpack[AnswerOptions]
    ) -> TokenStream:
        """One turn, piece by piece. An answer still running is ended first, as it stands.

        The turn enters the history when its answer ends, cancelled ones included; a turn that
        raises an error leaves the conversation as it was. See `AnswerOptions`.
        """
        check_names(options, AnswerOptions)
        self._answering.home.check()
        if self._active is not None:
            self._active.stream.close()
        started = Started()
        inputs = self._answering.inputs
        new = [inputs.tile(image, self._max_tiles) for image in pictures("images", images)]
        started.tiled()
        earlier = self._earlier()
        question = inputs.question(text("prompt", prompt), len(new), earlier_images=len(earlier))
        shown = [*earlier, *new]
        limit = self._answering.max_context
        if self._drop_oldest:  # keep room for an answer
            limit -= min(new_tokens(inputs, options), limit // 4)
        ids, needed = self._prompt([*self.history, (question, None)], shown, limit)
        cache, thinking = self._cache, self._thinking
        stream = self._begin(
            request(inputs, ids, needed, options, started, cache, thinking=thinking)
        )
        self._active = Turn(len(self.history), question, shown, stream)
        return stream

    def messages(self, *, embed: bool = True) -> list[dict[str, Any]]:
        """Return the conversation as messages of plain JSON: what `InternVL.chat` begins with.

        Args:
            embed: write every picture as a data URI, of what this chat holds of it; False: by its
                path where it came from a file, which must then stay as it is.
        """
        turns = self.history
        embed = flag("embed", embed, default=True)
        return written(turns, self._earlier(), self._system_message, embed=embed)

    def save(
        self, path: str | os.PathLike[str], *, embed: bool = True, overwrite: bool = False
    ) -> None:
        """Write `messages` to a file of JSON, which `InternVL.chat(messages=path)` goes on with.

        Raises:
            OutputError: the file exists, unless told to `overwrite` it, or cannot be written.
        """
        replace = flag("overwrite", overwrite)
        save(file_path("path", path), self.messages(embed=embed), overwrite=replace)

    def _prompt(
        self, turns: list[tuple[str, str | None]], images: list[TiledImage], limit: int
    ) -> tuple[list[int], list[TiledImage]]:
        """Token ids of the turns and their images; without the oldest ones where that is asked
        for and there are more than `limit` tokens."""
        ids: list[int] = []
        for _ in range(len(turns)):
            ids = self._answering.inputs.conversation(
                turns, images, self._system_message, control_tokens=self._control_tokens
            )
            if len(ids) <= limit or not self._drop_oldest or len(turns) == 1:
                break
            (dropped, _), *turns = turns
            images = images[dropped.count(IMAGE_PLACEHOLDER) :]
        return ids, images

    def _begin(self, asked: Request) -> TokenStream:
        try:
            return TokenStream(self._answering, asked)
        except ContextError as error:
            if not self._history:
                raise
            helps = (
                [Remedy.NEW_CHAT] if self._drop_oldest else [Remedy.NEW_CHAT, Remedy.DROP_OLDEST]
            )
            raise ContextError(
                error.message, without_gains(helps) | dict(error.remedies)
            ) from error

    def _settle(self) -> None:
        """Put a turn that has ended into the history; where an interrupt came in between, again."""
        turn = self._active
        if turn is None or (reply := turn.stream.reply) is None:
            return
        if not turn.stream.failed:
            # The history alone says how many images count: before it is told, these are none's.
            self._images = turn.shown
            answer = reply.whole if self._keep_thinking else reply.text
            self._history[turn.number :] = [(turn.question, answer)]
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
