"""Reasoning before an answer: told apart from it as the text arrives."""

from __future__ import annotations

from collections.abc import Sequence

from internvl_edge.bundle.prompt import THINK_END, THINK_START
from internvl_edge.runtime.decoding.request import Event


class Piece(str):
    """A piece of a streamed answer.

    Attributes:
        thinking: whether it belongs to the reasoning before the answer.
    """

    __slots__ = ("thinking",)

    thinking: bool

    def __new__(cls, text: str, *, thinking: bool = False) -> Piece:
        piece = super().__new__(cls, text)
        piece.thinking = thinking
        return piece


class Thoughts:
    """Parts a text that arrives in pieces at the first `</think>`.

    What stands before it is reasoning, without a `<think>` it may begin with; what follows is the
    answer. Blanks at the beginning of each are dropped. A text without `</think>` is all reasoning.
    """

    def __init__(self) -> None:
        self._held = ""
        self._opened = False  # what may be `<think>` at the beginning was read
        self._ended = False
        self._any = False  # something but blanks was given out of the present part

    def push(self, piece: str) -> tuple[str, str]:
        """Add text; return what is now certain of the reasoning and of the answer."""
        text, self._held = self._held + piece, ""
        if self._ended:
            return "", self._led(text)
        if not self._opened:
            text = text.lstrip()
            if THINK_START.startswith(text) and text != THINK_START:
                self._held = text
                return "", ""
            self._opened = True
            text = text.removeprefix(THINK_START)
        reasoning, mark, answer = text.partition(THINK_END)
        if not mark:
            keep = overlap(text, THINK_END)
            self._held = text[len(text) - keep :]
            return self._led(text[: len(text) - keep]), ""
        found = self._led(reasoning)
        self._ended, self._any = True, False
        return found, self._led(answer)

    def finish(self) -> str:
        """Return what was held back, which is reasoning."""
        held, self._held = self._held, ""
        return self._led(held)

    def _led(self, text: str) -> str:
        text = text if self._any else text.lstrip()
        self._any = self._any or bool(text)
        return text


def pieces_of(events: Sequence[Event]) -> list[Piece]:
    """Return what events of one answer add to its reasoning, and to the answer."""
    thought = "".join(event.thought for event in events)
    text = "".join(event.piece for event in events)
    return [*filter(None, (Piece(thought, thinking=True), Piece(text)))]


def part_thoughts(text: str) -> tuple[str, str]:
    """Part a whole text into reasoning and answer, both stripped at both ends; see `Thoughts`."""
    thoughts = Thoughts()
    reasoning, answer = thoughts.push(text)
    return (reasoning + thoughts.finish()).strip(), answer.strip()


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`, and is not all of it."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
