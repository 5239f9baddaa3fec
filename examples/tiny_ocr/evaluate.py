"""Exact-match accuracy on held-out receipts, asked in conversations of two turns.

The checkpoint directory is read back through `reference.py` and run by transformers in float32
with greedy decoding. The second turn sees the model's own first answer.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import DynamicCache, InternVLForConditionalGeneration

from internvl_edge.examples.tiny_ocr.data import ABSENT, ALL_LINES, FULL, HELD_OUT, scene
from internvl_edge.examples.tiny_ocr.model import Prompts, image_rows, tiles_of
from internvl_edge.examples.tiny_ocr.reference import load_checkpoint

LONGEST = 96  # ids of an answer


@dataclass(frozen=True)
class Outcome:
    """One answered question."""

    seed: int
    tiles: int  # of the grid, without the thumbnail
    turn: int  # 1 or 2
    kind: str
    question: str
    expected: str
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.expected


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% confidence interval of a proportion."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return centre - half, centre + half


@torch.inference_mode()
def greedy(
    model: InternVLForConditionalGeneration,
    prompts: Prompts,
    rows: torch.Tensor,
    tails: list[list[int]],
) -> list[str]:
    """Answers of a batch: rows (batch, image rows, hidden), tails the ids after these rows."""
    embed = model.get_input_embeddings()
    head = embed(torch.tensor(prompts.head))
    whole = [
        torch.cat([head, row, embed(torch.tensor(tail))])
        for row, tail in zip(rows, tails, strict=True)
    ]
    length = max(len(sequence) for sequence in whole)
    inputs = torch.zeros(len(whole), length, head.shape[-1])
    mask = torch.zeros(len(whole), length, dtype=torch.long)
    for n, sequence in enumerate(whole):  # left padding
        inputs[n, -len(sequence) :] = sequence
        mask[n, -len(sequence) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, answers = DynamicCache(), [[] for _ in whole]
    open_rows = set(range(len(whole)))
    for _ in range(LONGEST):
        hidden = model.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state
        chosen = model.lm_head(hidden[:, -1]).argmax(-1)
        for n, token in enumerate(chosen.tolist()):
            if token == prompts.end:
                open_rows.discard(n)
            elif n in open_rows:
                answers[n].append(token)
        if not open_rows:
            break
        inputs = embed(chosen)[:, None]
        mask = torch.cat([mask, torch.ones(len(whole), 1, dtype=torch.long)], dim=1)
        positions = positions[:, -1:] + 1
    return [prompts.tokenizer.decode(ids) for ids in answers]


def _kind(question: str, answer: str) -> str:
    if question == ALL_LINES:
        return "all lines"
    return "absent key" if answer == ABSENT else "key"


def ask(
    model: InternVLForConditionalGeneration, prompts: Prompts, seeds: list[int], tiles: int
) -> list[Outcome]:
    """Two-turn conversations about images of `tiles` grid tiles, plus `Read all lines.` alone."""
    scenes = [scene(seed, replace(FULL, tiles=(tiles,), alone=0.0)) for seed in seeds]
    with torch.inference_mode():
        cut = [torch.tensor(tiles_of(drawn.image)) for drawn in scenes]
        rows = image_rows(model, torch.cat(cut)).reshape(
            len(scenes), -1, model.config.text_config.hidden_size
        )
    outcomes: list[Outcome] = []

    def round_of(
        picked: list[int], turns: list[tuple[str, str]], before: list[list[int]], turn: int
    ) -> list[str]:
        asked = [
            past + prompts.question(q, not past) for past, (q, _) in zip(before, turns, strict=True)
        ]
        said = greedy(model, prompts, rows[picked], asked)
        for n, (question, answer), text in zip(picked, turns, said, strict=True):
            kind = _kind(question, answer)
            outcomes.append(Outcome(seeds[n], tiles, turn, kind, question, answer, text))
        return said

    first = [drawn.turns[0] for drawn in scenes]
    said = round_of(list(range(len(scenes))), first, [[] for _ in scenes], 1)
    again = [n for n, drawn in enumerate(scenes) if len(drawn.turns) > 1]
    before = [prompts.question(first[n][0], True) + prompts.answer(said[n]) for n in again]
    if again:
        round_of(again, [scenes[n].turns[1] for n in again], before, 2)
    alone = [
        n
        for n, drawn in enumerate(scenes)
        if len(drawn.turns) > 2 and drawn.turns[-1][0] == ALL_LINES
    ]
    if alone:
        round_of(alone, [scenes[n].turns[-1] for n in alone], [[] for _ in alone], 1)
    return outcomes


def report(outcomes: list[Outcome]) -> dict[str, dict[str, float | int]]:
    """Right, total, accuracy and Wilson bounds by kind of question, tile count and turn."""
    keys = [outcome for outcome in outcomes if outcome.kind == "key"]
    groups = {
        f"kind: {kind}": [o for o in outcomes if o.kind == kind]
        for kind in ("key", "absent key", "all lines")
    }
    groups |= {
        f"key, {tiles} tiles": [o for o in keys if o.tiles == tiles] for tiles in range(1, 7)
    }
    groups |= {f"key, turn {turn}": [o for o in keys if o.turn == turn] for turn in (1, 2)}
    groups["key and absent key"] = [o for o in outcomes if o.kind != "all lines"]
    groups["everything"] = outcomes
    table = {}
    for name, members in groups.items():
        right = sum(outcome.right for outcome in members)
        low, high = wilson(right, len(members))
        accuracy = right / max(1, len(members))
        table[name] = {
            "right": right,
            "total": len(members),
            "accuracy": accuracy,
            "low": low,
            "high": high,
        }
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("checkpoint"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="offset into the held-out seeds")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the table and the wrong answers here")
    parser.add_argument("--show", type=int, default=10, help="wrong answers to print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, prompts = load_checkpoint(args.checkpoint, "sdpa"), Prompts()
    outcomes: list[Outcome] = []
    for tiles in range(1, 7):
        seeds = [HELD_OUT + args.first + n for n in range(args.images) if n % 6 == tiles - 1]
        for start in range(0, len(seeds), args.batch):
            outcomes += ask(model, prompts, seeds[start : start + args.batch], tiles)
    table = report(outcomes)
    for name, row in table.items():
        bounds = f"[{row['low']:.2%}, {row['high']:.2%}]"
        print(f"{name:20} {row['right']:5d} / {row['total']:5d}  {row['accuracy']:7.2%}  {bounds}")
    wrong = [outcome for outcome in outcomes if not outcome.right]
    for o in wrong[: args.show]:
        place = f"seed {o.seed - HELD_OUT}, {o.tiles} tiles"
        print(f"wrong: {place}: {o.question} {o.expected!r}, said {o.said!r}")
    if args.json:
        details = [
            [o.seed - HELD_OUT, o.tiles, o.turn, o.question, o.expected, o.said] for o in wrong
        ]
        args.json.write_text(
            json.dumps({"images": args.images, "table": table, "wrong": details}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
