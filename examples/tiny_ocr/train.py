"""Train the tiny model from nothing on one CPU.

The schedule is bounded by time: difficulty and learning rate follow elapsed / --minutes. While
training, a linear head on the image rows is also asked which character is where (the renderer
knows); it makes the vision tower learn to read in minutes and is thrown away afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import multiprocessing
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import InternVLForConditionalGeneration

from internvl_edge.examples.tiny_ocr.data import FULL, HELD_OUT, LEVELS, SIDE, Glyph, Level, scene
from internvl_edge.examples.tiny_ocr.model import (
    TILE_TOKENS,
    Prompts,
    image_rows,
    sequence,
    tiles_of,
    v15_config,
)
from internvl_edge.examples.tiny_ocr.reference import hf_model

BATCH = {1: 28, 2: 16, 3: 12, 4: 10, 5: 9, 6: 8}  # images per process and step, by grid tiles
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-:"
REGION = 2 * 14  # pixels of one image row (four patches) along each side
COLUMNS = 7  # places for a character across a region; two down
SLOTS = 2 * COLUMNS
BLANK_WEIGHT = 0.1
DENSE = 36  # dense single tiles per process and step, for the vision tower alone
DENSE_SEEDS = HELD_OUT >> 1
SEEING = 0.2  # share of the schedule that is mostly the vision tower's
EARLY_PAUSE, PAUSE = 5, 2  # every so many steps also answer questions: in that share, after it
CHECKPOINT = "last.pt"
CHECKS = HELD_OUT + (1 << 30)  # seeds of the checks made while training


@dataclass
class Batch:
    """Images with equally many tiles, their conversations and where their characters are."""

    tiles: torch.Tensor  # uint8 (images * tiles, SIDE, SIDE, 3)
    tail: torch.Tensor  # (images, length), ids after the image rows
    owner: torch.Tensor  # (images, length), turn that an id answers, or -1
    places: torch.Tensor  # (images * tiles * TILE_TOKENS, SLOTS), classes of `places_of`
    questions: list[list[str]]


def places_of(glyphs: tuple[Glyph, ...], tiles: int) -> np.ndarray:
    """Which character is where: int64 (tiles, TILE_TOKENS, SLOTS), 0 blank, -100 not asked."""
    side = SIDE // REGION
    found = np.zeros((tiles, side, side, 2, COLUMNS), dtype=np.int64)
    if tiles > 1:
        found[-1] = -100  # the thumbnail is too small to read
    for glyph in glyphs:
        x, y = min(max(glyph.x, 0), SIDE - 0.01), min(max(glyph.y, 0), SIDE - 0.01)
        row, column = int(y // REGION), int(x // REGION)
        place = (
            glyph.tile,
            row,
            column,
            int(y % REGION // 14),
            int(x % REGION * COLUMNS // REGION),
        )
        found[place] = 1 + CHARS.index(glyph.char) if found[place] == 0 else -100
    return found.reshape(tiles, TILE_TOKENS, SLOTS)


def make_batch(prompts: Prompts, seed: int, size: int, level: Level) -> Batch:
    """Images of consecutive seeds that share a tile count."""
    scenes = [scene(seed + n, level) for n in range(size)]
    tiles = [tiles_of(drawn.image) for drawn in scenes]
    places = [places_of(drawn.glyphs, len(t)) for drawn, t in zip(scenes, tiles, strict=True)]
    tails = [prompts.tail(list(drawn.turns)) for drawn in scenes]
    length = max(len(ids) for ids, _ in tails)
    return Batch(
        torch.from_numpy(np.concatenate(tiles)),
        torch.tensor([ids + [2] * (length - len(ids)) for ids, _ in tails]),
        torch.tensor([owner + [-1] * (length - len(owner)) for _, owner in tails]),
        torch.from_numpy(np.concatenate(places)).flatten(0, 1),
        [[question for question, _ in drawn.turns] for drawn in scenes],
    )


class Stream(IterableDataset):
    """Endless training batches; difficulty follows the elapsed share of the schedule."""

    def __init__(self, dense: bool, first: int, stride: int, begun: float, seconds: float) -> None:
        self.dense, self.first, self.stride = dense, first, stride
        self.begun, self.seconds = begun, seconds

    def batches(self) -> Iterator[Batch]:
        """Batches drawn by a process of their own."""
        return iter(DataLoader(self, batch_size=None, num_workers=1, prefetch_factor=6))

    def _level(self, rng: random.Random) -> Level:
        done = (time.time() - self.begun) / self.seconds
        weights = (6, 3, 1) if done < 0.25 else (2, 4, 4) if done < 0.35 else (0.5, 1.5, 8)
        return LEVELS[rng.choices(("first", "middle", "full"), weights)[0]]

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        prompts = Prompts()
        for number in itertools.count(self.first, self.stride):
            rng = random.Random(f"batch {number}")
            level = LEVELS["glyphs"] if self.dense else self._level(rng)
            tiles = rng.choice(level.tiles)
            # seeds of a batch are consecutive: 64 numbers are set aside for each
            first = number * 64 + (DENSE_SEEDS if self.dense else 0)
            size = DENSE if self.dense else BATCH[tiles]
            yield make_batch(prompts, first, size, replace(level, tiles=(tiles,)))


def initialise(model: InternVLForConditionalGeneration) -> None:
    """Scale the initial weights for so narrow a model; transformers' 0.02 is for wide ones."""
    layers = model.config.text_config.num_hidden_layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position_embeddings" in name or "cls_token" in name:
                weight.normal_(0, 0.3)
            elif "embed_tokens" in name:
                weight.normal_(0, 0.5)
            elif weight.ndim >= 2:
                weight.normal_(0, weight[0].numel() ** -0.5)
                if name.endswith(
                    ("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight")
                ):
                    weight.mul_((2 * layers) ** -0.5)
                if "lm_head" in name:
                    weight.mul_(0.3)


def where_loss(probe: torch.nn.Linear, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """How well the image rows (tiles, TILE_TOKENS, hidden) tell which character is where."""
    guess = probe(rows.flatten(0, 1)).float().unflatten(-1, (SLOTS, -1)).flatten(0, 1)
    weight = torch.ones(guess.shape[-1])
    weight[0] = BLANK_WEIGHT
    return functional.cross_entropy(guess, places.flatten(), weight=weight)


def answer_loss(
    model: InternVLForConditionalGeneration, prompts: Prompts, rows: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of all answers, hits): hits (images, length) is false where the next id is wrong."""
    rows = rows.reshape(len(batch.tail), -1, rows.shape[-1])
    embedded = sequence(model, prompts.head, rows, batch.tail)
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    hidden = hidden[:, -batch.tail.shape[1] - 1 : -1]  # the state before each id of the tail
    asked = batch.owner >= 0
    logits = model.lm_head(hidden[asked]).float()
    target = batch.tail[asked]
    hits = torch.ones_like(asked)
    hits[asked] = logits.detach().argmax(-1) == target
    return functional.cross_entropy(logits, target), hits


@torch.no_grad()
def examine(
    model: InternVLForConditionalGeneration,
    probe: torch.nn.Linear,
    prompts: Prompts,
    batches: list[Batch],
) -> dict[str, float]:
    """Held-out results: place loss and exact matches of key questions per tile count.

    An answer is right if every id is the most likely one after the right ones before it, which is
    the same as greedy decoding giving exactly this answer.
    """
    right: dict[str, list[float]] = {}
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            rows = image_rows(model, batch.tiles)
            where = where_loss(probe, rows, batch.places)
            _, hits = answer_loss(model, prompts, rows, batch)
        right.setdefault("where", []).append(where.item())
        tiles = len(batch.tiles) // len(batch.tail)
        for owner, hit, asked in zip(batch.owner, hits, batch.questions, strict=True):
            for turn, question in enumerate(asked):
                good = float(hit[owner == turn].all())
                kind = "lines" if question.startswith("Read") else "key"
                right.setdefault(kind, []).append(good)
                if kind == "key":
                    right.setdefault(f"key{tiles}", []).append(good)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(right.items())}


class Mean:
    """Averages gradients over processes of one machine, through shared memory.

    Faster than a socket-based all-reduce by a fifth of a step. Must be made by the parent.
    """

    def __init__(self, processes: int, numbers: int) -> None:
        self._rows = torch.zeros(processes, numbers).share_memory_()
        self._gate = multiprocessing.get_context("spawn").Barrier(processes, timeout=600)

    def __call__(self, rank: int, values: torch.Tensor) -> torch.Tensor:
        """Values (at most `numbers`,) of this process -> their mean over the processes."""
        rows = self._rows[:, : len(values)]
        rows[rank] = values
        self._gate.wait()
        mean = rows.mean(0)
        self._gate.wait()  # nobody writes the next values before all have read these
        return mean


def average(parameters: list[torch.nn.Parameter], extra: float, rank: int, mean: Mean) -> float:
    """Replace every gradient by its mean, clipped to norm 1; returns the mean of `extra`."""
    parameters = [p for p in parameters if p.grad is not None]
    flat = mean(rank, torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor([extra])]))
    shared, flat = flat[-1].item(), flat[:-1]
    flat *= min(1.0, 1.0 / flat.norm().item())
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p))
    return shared


def build() -> tuple[InternVLForConditionalGeneration, torch.nn.Linear]:
    """The initial model and the head that is asked where characters are; the same every time."""
    torch.manual_seed(0)
    config = v15_config()
    model = hf_model(config, "eager").train()  # sdpa's backward is slower for sequences this short
    initialise(model)
    return model, torch.nn.Linear(config["llm_config"]["hidden_size"], SLOTS * (len(CHARS) + 1))


def train(rank: int, args: argparse.Namespace, mean: Mean) -> None:
    """One of --processes equal trainers: single-threaded, its own images, averaged gradients."""
    torch.set_num_threads(1)
    prompts = Prompts()
    model, probe = build()
    if args.compile:
        for layer in model.model.language_model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    parameters = [*model.parameters(), *probe.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)
    step, elapsed = 0, 0.0
    if args.resume:
        saved = torch.load(args.output / CHECKPOINT, weights_only=True)
        for name, part in (("model", model), ("probe", probe), ("optimizer", optimizer)):
            part.load_state_dict(saved[name])
        step, elapsed = saved["step"], saved["elapsed"]

    seconds = args.minutes * 60
    begun = time.time() - elapsed
    first, stride = step * args.processes + rank, args.processes
    dense = Stream(True, first, stride, begun, seconds).batches()
    mixed = Stream(False, first, stride, begun, seconds).batches()
    record = Record(args) if rank == 0 else None
    while elapsed < seconds:
        done = elapsed / seconds
        warm = min(1.0, (step + 1) / 400)
        rate = args.rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(dense)
        with torch.autocast("cpu", torch.bfloat16):
            where = where_loss(probe, image_rows(model, batch.tiles), batch.places)
        where.backward()
        answer = torch.full((), torch.nan)
        if step % (EARLY_PAUSE if done < args.seeing else PAUSE) == 0:
            batch = next(mixed)
            with torch.autocast("cpu", torch.bfloat16):
                rows = image_rows(model, batch.tiles)
                answer, _ = answer_loss(model, prompts, rows, batch)
                more = 0.2 * where_loss(probe, rows, batch.places)
            (answer + more).backward()
        elapsed = average(parameters, time.time() - begun, rank, mean)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        parts = {"model": model, "probe": probe, "optimizer": optimizer}
        if record:
            record.after(step, elapsed, rate, (answer.item(), where.item()), parts, prompts)
    if record:
        record.finish(step, elapsed, parts, prompts)


class Record:
    """What the first trainer does besides training: log, held-out checks and checkpoints."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.log = (args.output / "log.jsonl").open("a" if args.resume else "w")
        self.losses: list[tuple[float, float]] = []
        self.checked = self.kept = time.time()
        self.held: list[Batch] = []

    def _examine(self, parts: dict[str, Any], prompts: Prompts) -> dict[str, float]:
        if not self.held:
            level = [replace(FULL, tiles=(tiles,)) for tiles in range(1, 7)]
            self.held = [make_batch(prompts, CHECKS + 64 * n, 40, level[n]) for n in range(6)]
        return examine(parts["model"], parts["probe"], prompts, self.held)

    def _save(self, step: int, elapsed: float, parts: dict[str, Any]) -> None:
        """Written beside and then renamed, so that an interruption leaves the old one."""
        path = self.args.output / CHECKPOINT
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"step": step, "elapsed": elapsed}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self.log, flush=True)

    def after(
        self,
        step: int,
        elapsed: float,
        rate: float,
        values: tuple[float, float],
        parts: dict[str, Any],
        prompts: Prompts,
    ) -> None:
        """Called after every step; `elapsed` in seconds, `values` the two losses of the step."""
        self.losses.append(values)
        if step % 100 == 0:
            answer, where = np.nanmean(self.losses, axis=0).round(4).tolist()
            line = {"step": step, "minutes": round(elapsed / 60, 2), "rate": round(rate, 7)}
            line |= {"answer": answer, "where": where}
            if time.time() - self.checked > self.args.check_minutes * 60:
                line["held_out"] = self._examine(parts, prompts)
                self.checked = time.time()
            self._write(line)
            self.losses.clear()
        if time.time() - self.kept > 150:
            self._save(step, elapsed, parts)
            self.kept = time.time()

    def finish(self, step: int, elapsed: float, parts: dict[str, Any], prompts: Prompts) -> None:
        """The last checkpoint and the last check."""
        self._save(step, elapsed, parts)
        self._write({"step": step, "held_out": self._examine(parts, prompts)})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the log and the training checkpoint"
    )
    parser.add_argument("--minutes", type=float, default=105, help="length of the whole schedule")
    parser.add_argument("--processes", type=int, default=3, help="trainers of one thread each")
    parser.add_argument("--rate", type=float, default=7e-4, help="peak learning rate")
    parser.add_argument(
        "--check-minutes", type=float, default=4, help="time between held-out checks"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the output folder's checkpoint"
    )
    parser.add_argument("--seeing", type=float, default=SEEING, help="share spent on vision")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    numbers = 1 + sum(p.numel() for part in build() for p in part.parameters())
    multiprocessing.spawn(train, (args, Mean(args.processes, numbers)), nprocs=args.processes)


if __name__ == "__main__":
    main()
