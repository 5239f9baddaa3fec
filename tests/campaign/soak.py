"""Random requests that come and go together, on one model for a long time.

    cd tests && python -m campaign.soak --requests 2000

Requests join at random moments, with and without pictures, some drawn alike; some are cancelled
before, while or after they are answered, some are wrong, some have a picture whose rows are no
numbers. The memory is enough for a few at once, so that others wait and the newest is dropped. Each
answer has to be the one that a model gives which does nothing else, nobody may wait for ever, and
the process may not grow after a while.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.extras import example_room
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import (
    InternVL,
    InternVLEdgeError,
    Policy,
    PrecisionError,
    Reply,
    Sampling,
    UsageError,
)

#: Requests under way or waiting.
OUTSTANDING = 24
#: Of the requests, those before which the process may still grow.
WARM = 0.5
#: Requests between two looks at the memory, taken when all have ended.
EACH = 50
#: Enough for a few requests of 256 tokens.
POLICY = Policy(most_running=8, memory_bytes=4 << 20, ahead=8, aging_s=0.05)
#: The grey of a picture whose rows are no numbers.
BROKEN = 77
#: Nobody waits so long.
PATIENCE_S = 120.0


@dataclass
class Totals:
    """What came of the requests.

    Attributes:
        right: answered as alone, to the end.
        cancelled: ended before, with a beginning of that.
        refused: with the error that they ask for.
        wrong: none of these.
        resident: bytes of the process, each time all had ended.
        faults: descriptions of the wrong ones.
    """

    right: int = 0
    cancelled: int = 0
    refused: int = 0
    wrong: int = 0
    resident: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def growth(self) -> float:
        """How much larger the process is at last than when it was warm, as a part of that."""
        warm = int(len(self.resident) * WARM)
        part = max(1, (len(self.resident) - warm) // 4)
        first = statistics.median(self.resident[warm : warm + part])
        return statistics.median(self.resident[-part:]) / first - 1

    def __str__(self) -> str:
        return (
            f"right {self.right}, cancelled {self.cancelled}, refused {self.refused}, wrong"
            f" {self.wrong}; {self.resident[-1] / 1e6:.0f} MB, {self.growth():+.2%} since warm"
        )


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        prompt: a text; a word of it is repeated.
        pictures: their numbers.
        tokens: of the answer.
        seed: of sampling; None is greedy.
    """

    prompt: str
    pictures: tuple[int, ...]
    tokens: int
    seed: int | None

    @property
    def fails(self) -> type[Exception] | None:
        """What has to come instead of an answer."""
        if self.tokens < 1:
            return UsageError
        return PrecisionError if BROKEN in self.pictures else None

    @property
    def short(self) -> str:
        """A few words about it."""
        return repr(replace(self, prompt=self.prompt[:30]))

    def arguments(self) -> dict[str, Any]:
        """Of `generate`."""
        sampling = Sampling() if self.seed is None else Sampling(temperature=0.8, seed=self.seed)
        return {
            "prompt": self.prompt,
            "images": [picture(number) for number in self.pictures],
            "max_tiles": 2,
            "max_new_tokens": self.tokens,
            "sampling": sampling,
            "ignore_eos": self.tokens > 30,
        }


class Soak:
    """Asks a model, and another one alone.

    Args:
        bundle: of both.
        seed: of all that is drawn.
    """

    def __init__(self, bundle: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._model = InternVL.load(
            bundle, device="cpu", threads=1, reuse_bytes=1 << 20, policy=POLICY
        )
        self._model.engine.backend = Breaking(self._model.engine.backend)  # type: ignore[assignment]
        self._pool = [self._question() for _ in range(80)]
        alone = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
        self._wanted = {
            one: [] if one.fails else alone.generate(**one.arguments()).token_ids
            for one in self._pool
        }
        self.totals = Totals()

    async def ask(self, requests: int) -> None:
        """Ask so many, some at a time."""
        for begun in range(0, requests, EACH):
            room = asyncio.Semaphore(OUTSTANDING)
            tasks = []
            for _ in range(min(EACH, requests - begun)):
                await room.acquire()
                tasks.append(asyncio.create_task(self._one(room)))
                await asyncio.sleep(self._random.choice((0, 0, 0.001, 0.01)))
            await asyncio.gather(*tasks)
            self.totals.resident.append(resident())

    def close(self) -> None:
        """End the model's threads."""
        self._model.close()

    def _question(self) -> Question:
        draw = self._random
        word = draw.choice(("total", "date", "What is written here?", "Read the text."))
        numbers = draw.choice(((), (), (1,), (2,), (3, 1), (draw.randrange(4, 40),), (BROKEN,)))
        tokens = draw.choice((1, 5, 20, 20, 60, 120, 0))
        seed = draw.choice((None, None, None, draw.randrange(100)))
        return Question(f"{word} " * draw.choice((1, 1, 3, 30)), numbers, tokens, seed)

    async def _one(self, room: asyncio.Semaphore) -> None:
        question, kind = self._random.choice(self._pool), self._random.random()
        try:
            told = asyncio.wait_for(self._asked(question, kind), PATIENCE_S)
            self._judge(question, await told, cancelled=kind < 0.15)
        except InternVLEdgeError as error:
            self._refused(question, error)
        except asyncio.CancelledError:
            self.totals.cancelled += 1
        except asyncio.TimeoutError:
            self._fault(f"{question.short} waits for ever")
        finally:
            room.release()

    async def _asked(self, question: Question, kind: float) -> Reply | None:
        """Ask; cancel at a random moment, by the task, by the stream or by leaving it."""
        if kind >= 0.15:
            return await self._model.agenerate(**question.arguments())
        stream = self._model.astream(**question.arguments())
        after = self._random.choice((0, 1, 3, 10))
        if kind < 0.05:
            task = asyncio.create_task(stream.finish())
            await asyncio.sleep(self._random.choice((0, 0.002, 0.02)))
            task.cancel()
            return await task
        if not after:
            stream.cancel()
        async for _ in stream:
            after -= 1
            if after <= 0:
                if kind < 0.1:
                    return None  # nobody refers to it any more
                stream.cancel()
        return stream.reply

    def _judge(self, question: Question, reply: Reply | None, *, cancelled: bool) -> None:
        if question.fails is not None and not cancelled:
            self._fault(f"{question.short} was answered")
        elif reply is None:
            self.totals.cancelled += 1
        else:
            wanted = self._wanted[question]
            whole = reply.finish_reason != "cancelled"
            if reply.token_ids != (wanted if whole else wanted[: len(reply.token_ids)]):
                self._fault(f"{question.short}: {reply.token_ids} instead of {wanted}")
            elif whole:
                self.totals.right += 1
            else:
                self.totals.cancelled += 1

    def _refused(self, question: Question, error: InternVLEdgeError) -> None:
        if question.fails is not None and isinstance(error, question.fails):
            self.totals.refused += 1
        else:
            self._fault(f"{question.short} was refused: {error!r}")

    def _fault(self, text: str) -> None:
        self.totals.wrong += 1
        self.totals.faults.append(text)


class Breaking:
    """Passes everything on; rows of tiles of one grey are no numbers."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.floating]:
        rows: NDArray[np.floating] = self._inner.encode_tiles(tiles)
        rows[(tiles == BROKEN).all(axis=(1, 2, 3))] = np.nan
        return rows


def picture(number: int) -> NDArray[np.uint8]:
    if number == BROKEN:
        return np.full((60, 80, 3), BROKEN, np.uint8)
    return np.random.default_rng(number).integers(0, 256, (60, 80 + number, 3), np.uint8)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def soak(bundle: Path, seed: int, requests: int) -> Totals:
    """Ask so many requests; return what came of them."""
    running = Soak(bundle, seed)
    asyncio.run(running.ask(requests))
    running.close()
    return running.totals


def tiny_bundle(folder: Path) -> Path:
    """The small trained model in float32."""
    return export_bundle(example_room() / "checkpoint", folder / "bundle")


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns 1 where an answer was wrong or the process grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        totals = soak(tiny_bundle(Path(folder)), arguments.seed, arguments.requests)
    for fault in totals.faults:
        print(fault)
    print("MB:", *(round(size / 1e6, 1) for size in totals.resident))
    print(f"{totals} ({time.monotonic() - began:.0f} s)")
    return 1 if totals.wrong or totals.growth() > 0.01 else 0


if __name__ == "__main__":
    sys.exit(main())
