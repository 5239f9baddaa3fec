"""Chats interrupted at random moments: afterwards they answer as fresh ones of the same history.

    cd tests && python -m campaign.interrupts --seconds 600

Ctrl-C comes between two instructions of Python, where the interpreter looks for signals: after a
call, at the beginning of a function, at the end of a loop. Every such moment of a turn is counted,
and one of them is drawn. Likewise `cancel()`, an exception where the answer is read, and a stream
that is closed or left.
"""

from __future__ import annotations

import argparse
import dis
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import host_driver
import numpy as np
from numpy.typing import NDArray

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import Chat, InternVL, InternVLEdgeError, TokenStream

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
#: Texts that bring a conversation near the trained length of 512, beyond which each pass has a
#: rotary base of its own, and a plain one.
SYSTEMS = ("Look.", "Look closely. " * 24, "Look closely. " * 36)
REUSE = (0, 200_000, 1 << 30)
KINDS = ("ctrl-c",) * 6 + ("twice", "cancel", "raise", "close", "leave")
#: Of the reader, and of what stands in for a driver in C: their own code is not what is tried.
UNTRIED = (__file__, host_driver.__file__)
#: Moments of a turn, before one was counted.
FIRST_GUESS = 3000


class ReaderError(Exception):
    """What the loop that reads an answer may raise."""


@dataclass
class Totals:
    """What came of the tries.

    Attributes:
        tried: answers asked for after something was interrupted.
        refused: of these, with an error of ours, a fresh model's included.
        right, wrong: as a fresh model answers, or not.
        faults: descriptions of the wrong ones.
    """

    tried: int = 0
    refused: int = 0
    right: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Totals) -> None:
        """Count what came of other tries, too."""
        for name in ("tried", "refused", "right", "wrong", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        return f"tried {self.tried}, refused {self.refused}, right {self.right}, wrong {self.wrong}"


@dataclass(frozen=True)
class Places:
    """Where in a function the interpreter looks for signals, as offsets of instructions.

    Attributes:
        before: what it raises here comes before the instruction.
        behind: what it raises here belongs to the call, whose `with` or `try` ends behind it.
    """

    before: frozenset[int]
    behind: frozenset[int]


@cache
def places(code: CodeType) -> Places:
    """Return where the interpreter looks for signals in a function."""
    # Python 3.10 has blocks instead of a table, which end by an instruction of their own.
    entries = getattr(dis.Bytecode(code), "exception_entries", ())
    before, behind, call = set(), set(), None
    for instruction in dis.get_instructions(code):
        if call is not None:
            alike = _handler(entries, call) == _handler(entries, instruction.offset)
            (before if alike else behind).add(instruction.offset if alike else call)
        name = instruction.opname
        called = name.startswith("CALL") or name == "RESUME"
        call = instruction.offset if called else None
        if name.startswith(("JUMP_BACKWARD", "POP_JUMP_BACKWARD")) or name == "JUMP_ABSOLUTE":
            before.add(instruction.argval)
    return Places(frozenset(before), frozenset(behind))


def _handler(entries: Sequence[Any], offset: int) -> int | None:
    """Return where an instruction's exceptions are handled; None: not in this function."""
    return next((entry.target for entry in entries if entry.start <= offset < entry.end), None)


class Moments:
    """Counts the moments of a block of code, and acts at one of them.

    Args:
        at: when, counted from 1.
        act: what happens then; it may raise.
    """

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self._at, self._act = at, act
        self.seen = 0
        self._within: list[FrameType] = []  # that have called C, which has not come back
        # Held here: where it raises while memory is collected, the interpreter, which is about to
        # call it, lets go of it.
        self._tracers = self._called, self._enter, self._step

    def __enter__(self) -> Moments:
        called, enter, _ = self._tracers
        sys.setprofile(called)
        sys.settrace(enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        self._within.clear()  # nobody else holds what they hold

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename in UNTRIED:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._tracers[-1]

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode" and frame.f_lasti in places(frame.f_code).before:
            self._count()
        return self._tracers[-1]

    def _called(self, frame: FrameType, event: str, arg: object) -> None:
        """Raise at the end of a call, which is then the call's: not where C called, which goes on
        before Python looks for a signal."""
        if event != "return" and frame.f_code.co_filename not in UNTRIED:
            self._told_of_c(frame, event)
        callers = {"return": frame.f_back, "c_return": frame}
        caller = callers.get(event)
        if caller is None or caller.f_code.co_filename in UNTRIED or caller in self._within:
            return
        if caller.f_lasti in places(caller.f_code).behind:
            self._count()

    def _told_of_c(self, frame: FrameType, event: str) -> None:
        if event == "c_call":
            self._within.append(frame)
        elif event in ("c_return", "c_exception") and self._within:
            self._within.pop()

    def _count(self) -> None:
        self.seen += 1
        if self.seen == self._at:
            self._act()


@dataclass(frozen=True)
class Turn:
    """A question, with a number that no other one has, and its pictures."""

    text: str
    images: list[NDArray[np.uint8]]
    tokens: int


class Campaign:
    """Holds conversations on one model and compares them with another one's answers.

    Args:
        model: whose turns are interrupted.
        fresh: keeps nothing between answers.
        seed: of everything that is drawn.

    Attributes:
        turns: those that may be told of, by their text.
    """

    def __init__(self, model: InternVL, fresh: InternVL, seed: int) -> None:
        self._model, self._fresh, self._seed = model, fresh, seed
        self._random = random.Random(seed)
        self.turns: dict[str, Turn] = {}
        self._moments = FIRST_GUESS
        self.totals = Totals()

    def conversation(self) -> None:
        """Some turns, an interrupted one, some more; then the same question in another chat."""
        draw = self._random
        system, max_tiles = draw.choice(SYSTEMS), draw.choice((1, 2))
        chat = self._model.chat(system_message=system, max_tiles=max_tiles)
        for _ in range(draw.randint(0, 2)):
            self.compare(chat, self._turn(), system, max_tiles, "before")
        told = list(chat.history)
        kind, turn = draw.choice(KINDS), self._turn()
        when = self._disturb(chat, turn, kind)
        if chat.history[: len(told)] != told or len(chat.history) > len(told) + 1:
            self._fault(f"{when}: history was {told}, is {chat.history}")
        for _ in range(draw.randint(1, 2)):
            self.compare(chat, self._turn(), system, max_tiles, when)
        other = self._model.chat(system_message=system, max_tiles=max_tiles)
        self.compare(other, turn, system, max_tiles, f"another chat after {when}")

    def _turn(self) -> Turn:
        draw = self._random
        # Few pictures: they come again, in other places and after other ones.
        pictures = [picture(draw.randrange(3)) for _ in range(draw.choice((0, 0, 1, 1, 2)))]
        text = f"Number {len(self.turns)}, {draw.choice(('what', 'who', 'where'))}?"
        self.turns[text] = Turn(text, pictures, draw.randint(1, 6))
        return self.turns[text]

    def _disturb(self, chat: Chat, turn: Turn, kind: str) -> str:
        """Hold a turn that does not go as it should; says what happened to it."""
        at = self._random.randint(1, self._moments + self._moments // 20)
        with _expected():
            if kind in ("ctrl-c", "twice", "cancel"):
                self._at_a_moment(chat, turn, kind, at)
            else:
                self._by_the_reader(chat, turn, kind)
        return f"{kind} at {at} of {turn.text!r}"

    def _at_a_moment(self, chat: Chat, turn: Turn, kind: str, at: int) -> None:
        streams: list[TokenStream] = []

        def act() -> None:
            if kind != "cancel":
                raise KeyboardInterrupt
            for stream in streams:
                stream.cancel()

        counted = Moments(at, act)
        try:
            with counted:
                streams.append(self._ask(chat, turn))
                streams[0].finish()
            self._moments = counted.seen
        except KeyboardInterrupt:
            if kind != "twice" or not streams:
                raise
            with Moments(self._random.randint(1, 200), act):
                streams[0].close()

    def _by_the_reader(self, chat: Chat, turn: Turn, kind: str) -> None:
        stream = self._ask(chat, turn)
        for _ in range(self._random.randint(0, 4)):
            next(stream, None)
        if kind == "raise":
            raise ReaderError
        if kind == "close":
            stream.close()

    def _ask(self, chat: Chat, turn: Turn) -> TokenStream:
        return chat.stream(turn.text, turn.images, max_new_tokens=turn.tokens)

    def compare(self, chat: Chat, turn: Turn, system: str, max_tiles: int, when: str) -> None:
        """Ask, and ask a fresh model with the history that the chat then says it has."""
        totals = self.totals
        totals.tried += 1
        got, refusal = answer(lambda: chat.send(turn.text, turn.images, max_new_tokens=turn.tokens))
        # A turn that an interrupt left running ends when the next one begins.
        history = list(chat.history if got is None else chat.history[:-1])
        told = [*history, (chat.history[-1][0] if got is not None else turn.text, None)]
        wanted, reason = answer(lambda: self._afresh(told, turn, system, max_tiles))
        if got is None and wanted is None:
            totals.refused += 1
        elif got == wanted:
            totals.right += 1
        else:
            said = f"{got or refusal!r} instead of {wanted or reason!r}"
            self._fault(f"{when}: {said} with history {history}")

    def _afresh(
        self, told: list[tuple[str, str | None]], turn: Turn, system: str, max_tiles: int
    ) -> Any:
        fresh = self._fresh
        images = [image for question, _ in told for image in self._shown(question)]
        tiled = [fresh.tile_with_identity(image, max_tiles) for image in images]
        ids = fresh.encode_conversation(told, tiled, system)
        options = {"max_tiles": max_tiles, "max_new_tokens": turn.tokens}
        return fresh.generate(ids, images, **options)

    def _shown(self, question: str) -> list[NDArray[np.uint8]]:
        turn = self.turns[question[question.index("Number") :]]
        return turn.images if "<image>" in question else []

    def _fault(self, text: str) -> None:
        self.totals.wrong += 1
        self.totals.faults.append(f"seed {self._seed}: {text}")


def answer(ask: Callable[[], Any]) -> tuple[list[int] | None, Exception | None]:
    """Token ids; or None and the error, which must be one of ours."""
    try:
        return ask().token_ids, None
    except InternVLEdgeError as error:
        return None, error


@contextmanager
def _expected() -> Iterator[None]:
    """What a disturbed turn may raise."""
    with suppress(KeyboardInterrupt, ReaderError, InternVLEdgeError):
        yield


@cache
def picture(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)


def run(
    load: Callable[[int], InternVL], seed: int, more: Callable[[int], bool], each: int = 8
) -> Totals:
    """Hold conversations while `more(number)`, on models that are loaded anew after `each`.

    Args:
        load: a model that keeps so many bytes between answers.
    """
    totals, fresh, number = Totals(), load(0), 0
    while more(number):
        campaign = Campaign(load(REUSE[number % len(REUSE)]), fresh, seed + number)
        for _ in range(each):
            try:
                campaign.conversation()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
                campaign._fault(f"raised {error!r}")
        totals.add(campaign.totals)
        number += 1
    return totals


def main() -> int:
    """Command line; returns 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(GOLDEN, Path(folder) / "bundle")

        def load(reuse: int) -> InternVL:
            return InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=reuse)

        totals = run(load, arguments.seed, lambda number: time.monotonic() < end)
    for fault in totals.faults:
        print(fault)
    print(totals)
    return 1 if totals.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
