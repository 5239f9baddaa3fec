"""Requests that arrive by chance, and what becomes of them: the load of `bench latency throughput`.

Everything is drawn from a seed: the same requests arrive in the same order, with gaps that are
longer or shorter by one factor.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter

import numpy as np
from PIL import Image

from internvl_edge.bench.kernels.cpu import photo
from internvl_edge.bench.latency.measure import JPEG_QUALITY, grid_shape, grid_tiles, question
from internvl_edge.runtime import InternVL, Sampling
from internvl_edge.runtime.asking import PromptOptions, prompt_request
from internvl_edge.runtime.decoding.request import Request
from internvl_edge.runtime.decoding.scheduler import Scheduler

#: Tokens of each answer before another request arrives.
STEADY = 48


@dataclass(frozen=True)
class Mix:
    """What requests are drawn from, each part by itself.

    Attributes:
        tiles: of the picture, thumbnail included; 0 is none.
        prompt: tokens of the question.
        new_tokens: of the answer.
        seed: of all chance.
    """

    tiles: Sequence[int]
    prompt: Sequence[int]
    new_tokens: Sequence[int]
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        prompt: the question.
        picture: as JPEG; None: there is none.
        max_tiles: see `InternVL.stream`.
        new_tokens: of the answer.
        gap: to the one before, as a multiple of the mean.
    """

    prompt: str
    picture: bytes | None
    max_tiles: int | None
    new_tokens: int
    gap: float

    @property
    def images(self) -> Sequence[bytes]:
        return () if self.picture is None else (self.picture,)

    @property
    def options(self) -> PromptOptions:
        """How it is answered: to the last token, since the stop token is disabled."""
        return {
            "max_tiles": self.max_tiles,
            "max_new_tokens": self.new_tokens,
            "ignore_eos": True,
            "sampling": Sampling(),
        }


@dataclass(frozen=True)
class Answered:
    """What became of a request. Seconds.

    Attributes:
        arrived, ended: on one clock.
        ttft: from its arrival to the first token, waiting included.
        gaps: between its tokens.
        token_ids: of the answer.
    """

    arrived: float
    ended: float
    ttft: float
    gaps: list[float]
    token_ids: list[int]


def draw(model: InternVL, mix: Mix, count: int) -> list[Asked]:
    """Draw requests; no two pictures are the same."""
    chance = random.Random(mix.seed)
    return [_one(model, mix, chance, number) for number in range(count)]


async def arrive(model: InternVL, asked: Sequence[Asked], mean_gap: float) -> list[Answered]:
    """Ask as a Poisson process of so many seconds between two requests, whoever is answered."""
    tasks = []
    for one in asked:
        await asyncio.sleep(one.gap * mean_gap)
        tasks.append(asyncio.create_task(answer(model, one)))
    return list(await asyncio.gather(*tasks))


@dataclass(frozen=True)
class Interference:
    """What one request does to others: seconds between their tokens, and to its own first one."""

    before: list[float]
    meanwhile: list[float]
    ttft: float


def interfere(model: InternVL, asked: Sequence[Asked]) -> Interference:
    """Answer all but the last; ask that one when each of them has `STEADY` tokens, and go on until
    its first token."""
    scheduler = Scheduler(model.answering, model.answering.lane)
    *others, late = (partial(_request, model, one) for one in asked)
    handles = [scheduler.add(make()) for make in others]
    while min(len(handle.ids) for handle in handles) <= STEADY:
        scheduler.step()
    last = scheduler.add(late())
    while not last.ids:
        scheduler.step()
    began = last.request.started
    before: list[float] = []
    meanwhile: list[float] = []
    for handle in handles:
        times = [handle.request.started + passed for passed in handle.request.timings.token_s]
        gaps = [(second > began, second - first) for first, second in pairwise(times)]
        before += [gap for after, gap in gaps if not after][-STEADY:]
        meanwhile += [gap for after, gap in gaps if after]
        scheduler.end(handle)
    scheduler.end(last)
    return Interference(before, meanwhile, last.request.timings.ttft_s)


def _request(model: InternVL, asked: Asked) -> Request:
    return prompt_request(model.inputs, asked.prompt, asked.images, **asked.options)


async def answer(model: InternVL, asked: Asked) -> Answered:
    """Ask one and wait for its answer."""
    arrived = perf_counter()
    stream = model.astream(asked.prompt, asked.images, **asked.options)
    reply = await stream.finish()
    ended, timings = perf_counter(), reply.timings
    ttft = ended - arrived - (timings.token_s[-1] - timings.token_s[0])
    return Answered(arrived, ended, ttft, timings.itl_s, reply.token_ids)


def _one(model: InternVL, mix: Mix, chance: random.Random, number: int) -> Asked:
    tiles = chance.choice(list(mix.tiles))
    return Asked(
        f"{number}. {question(model, chance.choice(list(mix.prompt)))}",
        drawn_picture(model, tiles, mix.seed * 10_000 + number),
        grid_tiles(model.spec, tiles),
        chance.choice(list(mix.new_tokens)),
        chance.expovariate(1.0),
    )


def drawn_picture(model: InternVL, tiles: int, seed: int) -> bytes | None:
    """A JPEG of so many tiles, other than that of any other seed; None without tiles."""
    count = grid_tiles(model.spec, tiles)
    if count is None:
        return None
    columns, rows = grid_shape(count)
    side = model.spec.vision.tile_size
    pixels = photo(columns * side, rows * side)
    noise = np.random.default_rng(seed).integers(0, 40, pixels.shape, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels // 2 + noise).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
