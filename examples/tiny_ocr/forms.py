"""Forms to be filled in from a receipt: the question holds the keys as JSON, the answer the values.

The committed checkpoint was not taught them: `train_forms.py` teaches a copy of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

from internvl_edge.examples.tiny_ocr.data import FULL, Level, Scene, scene

#: Before the form, in a question.
FORM = "Fill in this form."
#: As chat models write JSON.
INDENT = 2
#: Receipts whose forms are learned have one to four fields.
RECEIPT = replace(FULL, fields=4)
#: Two of these are learned in one conversation.
SMALL = replace(RECEIPT, tiles=(1, 2, 3))

Turn = tuple[str, str]


def form(fields: Sequence[Turn], indent: int | None = INDENT) -> Turn:
    """Return the question for (key, value) fields, in their order, and its answer."""
    empty = json.dumps(dict.fromkeys(dict(fields), ""), indent=indent)
    return f"{FORM}\n{empty}", json.dumps(dict(fields), indent=indent)


def receipt(seed: int, level: Level = RECEIPT) -> tuple[Scene, Turn]:
    """Draw the receipt of a seed and the form for all its fields, in an order of the form's own."""
    drawn = scene(seed, level)
    order = random.Random(f"form {seed}").sample(drawn.fields, len(drawn.fields))
    return drawn, form(order)
