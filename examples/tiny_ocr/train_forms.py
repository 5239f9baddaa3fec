"""Teach a copy of the committed checkpoint to fill in forms (`forms.py`).

The vision tower and the projector stay as they are. Conversations are about one receipt or about
two, each with its form; a share asks the old questions, which would be forgotten otherwise. The
schedule is bounded by time, as in `train.py`.
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

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import InternVLForConditionalGeneration

from internvl_edge.examples.tiny_ocr.data import FULL, Scene, scene
from internvl_edge.examples.tiny_ocr.forms import INDENT, RECEIPT, SMALL, Turn, form, receipt
from internvl_edge.examples.tiny_ocr.model import TILE_TOKENS, Prompts, image_rows, tiles_of
from internvl_edge.examples.tiny_ocr.reference import load_checkpoint
from internvl_edge.examples.tiny_ocr.train import CHECKPOINT, CHECKS

SIZE = {1: 28, 2: 20, 3: 16, 4: 14, 5: 12, 6: 10}  # conversations per step, by grid tiles
KINDS, SHARES = ("form", "two forms", "old"), (5, 3, 2)
COMPACT = 0.2  # share of forms on one line
PART = 0.2  # share of forms that ask for some of the fields only
WARM_STEPS = 100
AT_ONCE = 20  # held-out forms
SEEDS = 1 << 36  # from here on, far from those of `train.py`

Talk = list[tuple[Scene, list[Turn]]]  # receipts in the order they are shown, with their turns


@dataclass
class Batch:
    """Conversations about receipts with equally many tiles.

    Attributes:
        tiles: uint8 (tiles of all, SIDE, SIDE, 3), in the order of their slots.
        ids: int64 (conversations, length), padded at the end; image slots are `<IMG_CONTEXT>`.
        answers: bool (conversations, length), true where an id belongs to an answer.
    """

    tiles: torch.Tensor
    ids: torch.Tensor
    answers: torch.Tensor


def ids_of(prompts: Prompts, talk: list[tuple[int, list[Turn]]]) -> tuple[list[int], list[bool]]:
    """Return the ids of (tiles, turns) of one receipt after another, and which are of answers."""
    ids: list[int] = []
    answers: list[bool] = []
    again = prompts.head[prompts.head.index(prompts.start, 2) :]  # opens a turn with a picture
    for tiles, turns in talk:
        opened = prompts.head if not ids else again
        tail, owner = prompts.tail(turns)
        ids += [*opened, *[prompts.context] * (tiles * TILE_TOKENS), *tail]
        answers += [False] * (len(ids) - len(answers) - len(tail)) + [turn >= 0 for turn in owner]
    return ids, answers


def make_batch(prompts: Prompts, talks: list[Talk]) -> Batch:
    """Lay conversations side by side."""
    cut = [[(tiles_of(drawn.image), turns) for drawn, turns in talk] for talk in talks]
    told = [ids_of(prompts, [(len(tiles), turns) for tiles, turns in talk]) for talk in cut]
    length = max(len(ids) for ids, _ in told)
    return Batch(
        torch.cat([torch.from_numpy(tiles) for talk in cut for tiles, _ in talk]),
        torch.tensor([ids + [2] * (length - len(ids)) for ids, _ in told]),
        torch.tensor([answers + [False] * (length - len(answers)) for _, answers in told]),
    )


def draw_form(rng: random.Random, drawn: Scene) -> Turn:
    """Ask for a receipt's fields, or some, in any order."""
    count = len(drawn.fields)
    if rng.random() < PART:
        count = rng.randint(1, count)
    return form(rng.sample(drawn.fields, count), None if rng.random() < COMPACT else INDENT)


def draw_talk(rng: random.Random, kind: str, seed: int, tiles: int) -> Talk:
    """Draw a conversation of a kind from two seeds: `seed` and the next."""
    if kind == "old":
        drawn = scene(seed, replace(FULL, tiles=(tiles,)))
        return [(drawn, list(drawn.turns))]
    shown = [
        scene(seed + n, replace(RECEIPT, tiles=(tiles,))) for n in range(1 + (kind == "two forms"))
    ]
    return [(drawn, [draw_form(rng, drawn)]) for drawn in shown]


class Stream(IterableDataset):
    """Endless training batches, from `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def batches(self) -> Iterator[Batch]:
        """Batches drawn by a process of their own."""
        return iter(DataLoader(self, batch_size=None, num_workers=1, prefetch_factor=6))

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        prompts = Prompts()
        for number in itertools.count(self.first):
            rng = random.Random(f"forms {number}")
            (kind,) = rng.choices(KINDS, SHARES)
            two = kind == "two forms"
            tiles = rng.choice((SMALL if two else RECEIPT).tiles)
            size = SIZE[tiles] // (1 + two)
            seeds = range(SEEDS + number * 64, SEEDS + number * 64 + 2 * size, 2)
            yield make_batch(prompts, [draw_talk(rng, kind, seed, tiles) for seed in seeds])


def answer_loss(
    model: InternVLForConditionalGeneration, prompts: Prompts, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss of all answers, hits): hits (conversations, length) are false at wrong ids."""
    with torch.no_grad():
        rows = image_rows(model, batch.tiles).flatten(0, 1)
    embedded = model.get_input_embeddings()(batch.ids)
    slots = (batch.ids == prompts.context)[..., None]
    embedded = embedded.masked_scatter(slots, rows.to(embedded.dtype))
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    asked = batch.answers[:, 1:]
    logits = model.lm_head(hidden[:, :-1][asked]).float()
    target = batch.ids[:, 1:][asked]
    hits = torch.ones_like(batch.answers)
    hits[:, 1:][asked] = logits.detach().argmax(-1) == target
    return functional.cross_entropy(logits, target), hits


@torch.no_grad()
def examine(
    model: InternVLForConditionalGeneration, prompts: Prompts, first: int, count: int
) -> int:
    """Count forms that greedy decoding fills in exactly, of so many held-out ones.

    Every id is the most likely one after the right ones before it: as in `train.examine`.
    """
    right = 0
    for start in range(first, first + count, AT_ONCE):
        seeds = range(start, min(start + AT_ONCE, first + count))
        talks = [[(drawn, [turn])] for drawn, turn in map(receipt, seeds)]
        with torch.autocast("cpu", torch.bfloat16):
            _, hits = answer_loss(model, prompts, make_batch(prompts, talks))
        right += int(hits.all(-1).sum())
    return right


def rate_at(peak: float, step: int, done: float) -> float:
    """Learning rate: a short rise, then half a cosine over the schedule; `done` is its share."""
    return peak * min(1.0, step / WARM_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def train(args: argparse.Namespace) -> None:
    """Train the decoder; log and keep it at every check."""
    prompts, model = Prompts(), load_checkpoint(args.checkpoint, "eager").train()
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.rate, (0.9, 0.98), weight_decay=0.02, fused=True)
    log = (args.output / "log.jsonl").open("w")
    begun, done = time.time(), 0.0
    losses: list[float] = []
    for step, batch in enumerate(Stream(args.first).batches(), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(args.rate, step, done)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = answer_loss(model, prompts, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        done = min(1.0, (time.time() - begun) / (60 * args.minutes))
        if step % args.check == 0 or done == 1:
            line = {"step": step, "minutes": round(done * args.minutes, 2)}
            line |= {"answer": round(sum(losses) / len(losses), 4)}
            line |= {"right of 100": examine(model, prompts, CHECKS, 100)}
            print(json.dumps(line), file=log, flush=True)
            torch.save({"model": model.state_dict()}, args.output / CHECKPOINT)
            losses.clear()
        if done == 1:
            return


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the log and weights")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("checkpoint"))
    parser.add_argument("--minutes", type=float, default=25, help="length of the whole schedule")
    parser.add_argument("--first", type=int, default=0, help="batches seen in runs before this one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=7e-4, help="peak learning rate")
    parser.add_argument("--check", type=int, default=200, help="steps between held-out checks")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
