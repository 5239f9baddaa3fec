"""Synthetic receipts: an image, what is written on it and questions about it, all from one seed.

An image is a grid of 1 to 6 square cells, one per tile of the dynamic tiling. Every cell holds up
to two fields such as `TOTAL 12.50` at a random place. Lengths below are in tile pixels (a tile
is 112 pixels wide) unless a name says otherwise; the image itself is drawn at another scale, so the
tiler resizes it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from internvl_edge.examples.tiny_ocr.tokenizer import KEYS
from internvl_edge.runtime.images.preprocess import select_grid

SIDE = 112  # pixels per tile
MAX_TILES = 6
GRIDS = (
    (1, 1),
    (2, 1),
    (1, 2),
    (3, 1),
    (1, 3),
    (2, 2),
    (4, 1),
    (1, 4),
    (5, 1),
    (1, 5),
    (6, 1),
    (1, 6),
    (3, 2),
    (2, 3),
)
HELD_OUT = 1 << 40  # seeds from here on are never trained on
LETTERS = "ABCDEFGHIJKLMNOPRSTUVWXYZ"  # without Q, too much like O at this size
CONSONANTS, VOWELS = "BCDFGHJKLMNPRSTVWXZ", "AEIOUY"
ALL_LINES = "Read all lines."
ABSENT = "none"


@dataclass(frozen=True)
class Level:
    """How hard a sample is: tiles of the image, fields on it and the odds of a missing key."""

    tiles: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    fields: int = 8  # at most
    least: int = 1  # fields, as far as they fit
    per_cell: int = 2  # at most
    absent: float = 0.12  # chance that an image is also asked for a key it lacks
    noise: float = 6.0  # largest standard deviation of the pixel noise, in grey levels
    turns: int = 6  # questions about keys per image, at most
    alone: float = 0.4  # chance that an image asked for all its lines is asked for nothing else


FULL = Level()
LEVELS = {
    "glyphs": Level(tiles=(1,), fields=3, least=3, per_cell=3),
    "first": Level(tiles=(1,), absent=0.0, noise=2.0),
    "middle": Level(tiles=(1, 2, 3), fields=4, absent=0.05, noise=4.0),
    "full": FULL,
}


@dataclass(frozen=True)
class Glyph:
    """One character: its tile (row-major), the centre inside that tile in pixels, the character."""

    tile: int
    x: float
    y: float
    char: str


@dataclass(frozen=True)
class Scene:
    """A drawn sample: the image, its (columns, rows), fields in reading order and questions."""

    image: Image.Image
    grid: tuple[int, int]
    fields: tuple[tuple[str, str], ...]
    turns: tuple[tuple[str, str], ...]
    glyphs: tuple[Glyph, ...]


def _word(rng: random.Random, low: int, high: int) -> str:
    """A made-up name; one in three is letters without any pattern."""
    length = rng.randint(low, high)
    if rng.random() < 1 / 3:
        return "".join(rng.choices(LETTERS, k=length))
    start = rng.random() < 0.5
    return "".join(
        rng.choice(CONSONANTS if (n % 2 == 0) == start else VOWELS) for n in range(length)
    )


def _money(rng: random.Random) -> str:
    return f"{rng.randrange(10 ** rng.randint(1, 3))}.{rng.randrange(100):02d}"


def _serial(rng: random.Random, pairs: int) -> str:
    return "".join(rng.choice(LETTERS) + str(rng.randrange(10)) for _ in range(pairs))


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "TOTAL": _money,
    "TAX": _money,
    "CASH": _money,
    "DATE": lambda rng: (
        f"20{rng.randrange(40):02d}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    ),
    "TIME": lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}",
    "ID": lambda rng: _serial(rng, 2),
    "CODE": lambda rng: _serial(rng, rng.randint(2, 3)),
    "NAME": lambda rng: _word(rng, 3, 5),
    "SHOP": lambda rng: _word(rng, 3, 5),
    "ITEM": lambda rng: _word(rng, 3, 5),
    "QTY": lambda rng: str(rng.randrange(1, 1000)),
    "TEL": lambda rng: f"{rng.randrange(1000):03d}-{rng.randrange(1000):03d}",
}


@cache
def _font(quarters: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font; the size is in quarter pixels so that few sizes are cached."""
    return ImageFont.load_default(quarters / 4)


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(paper, ink), at least about 110 grey levels apart."""
    paper = tuple(rng.randint(195, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 85) for _ in range(3))
    return paper, ink


def _shape(rng: random.Random, columns: int, rows: int) -> tuple[int, int]:
    """Image (width, height) in its own pixels for which the tiler picks this grid."""
    low, high = (1.1, 1.4) if (columns, rows) == (1, 1) else (1.1, 1.6)
    while True:
        scale, stretch = rng.uniform(low, high), rng.uniform(-0.07, 0.07)
        width = round(columns * SIDE * scale * (1 + stretch))
        height = round(rows * SIDE * scale * (1 - stretch))
        if select_grid(width, height, max_tiles=MAX_TILES, tile_size=SIDE) == (columns, rows):
            return width, height


def _lines(
    rng: random.Random, fields: list[tuple[str, str]], size: float, width: float
) -> list[str]:
    """The text lines of one cell: `KEY value` on one line, or the value below its key."""
    lines: list[str] = []
    for key, value in fields:
        line = key + rng.choice((" ", " ", ": ", "  ")) + value
        if rng.random() < 0.7 and _font(round(size * 4)).getlength(line) <= width:
            lines.append(line)
        else:
            lines += [key, value]
    return lines


def _deal(rng: random.Random, keys: list[str], cells: int, per_cell: int) -> list[list[str]]:
    """Spread the keys over the cells; early ones go to distinct cells until all are in use."""
    order = rng.sample(range(cells), cells)
    dealt: list[list[str]] = [[] for _ in range(cells)]
    for n, key in enumerate(keys):
        cell = order[n] if n < cells and rng.random() < 0.8 else rng.randrange(cells)
        if len(dealt[cell]) < per_cell:
            dealt[cell].append(key)
    return dealt


def _questions(
    rng: random.Random, fields: list[tuple[str, str]], level: Level
) -> list[tuple[str, str]]:
    """Questions in random order; reading everything is asked alone or last, it tells the rest."""
    turns = [(f"What is the {key}?", value) for key, value in fields]
    if rng.random() < level.absent:
        missing = rng.choice([key for key in KEYS if key not in dict(fields)])
        turns.append((f"What is the {missing}?", ABSENT))
    rng.shuffle(turns)
    turns = turns[: level.turns]
    if len(fields) <= 4 and rng.random() < 0.5:
        everything = (ALL_LINES, "\n".join(f"{key} {value}" for key, value in fields))
        turns = [everything] if rng.random() < level.alone else [*turns, everything]
    return turns


def scene(seed: int, level: Level = FULL, attempt: int = 0) -> Scene:
    """Draw the sample of one seed; `attempt` counts the draws in which no field fitted."""
    rng = random.Random(f"{seed}/{attempt}")
    tiles = rng.choice(level.tiles)
    columns, rows = rng.choice([grid for grid in GRIDS if grid[0] * grid[1] == tiles])
    width, height = _shape(rng, columns, rows)
    sx, sy = width / (columns * SIDE), height / (rows * SIDE)  # image pixels per tile pixel
    paper, ink = _colours(rng)
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)

    most = min(level.fields, tiles * level.per_cell, len(KEYS))
    keys = rng.sample(KEYS, rng.randint(level.least, most))
    fields: list[tuple[str, str]] = []
    glyphs: list[Glyph] = []
    base = rng.uniform(17.0, 19.0)
    for tile, dealt in enumerate(_deal(rng, keys, tiles, level.per_cell)):
        size = base + rng.uniform(-0.5, 0.5)
        font = _font(round(size * sy * 4))
        squeeze = sy / sx  # glyphs keep their shape in the image, the tiler then stretches them
        content = [(key, MAKERS[key](rng)) for key in dealt]
        lines = _lines(rng, content, size * squeeze, SIDE - 6)
        pitch = size * rng.uniform(1.3, 1.6)
        while lines and (len(lines) * pitch > SIDE - 4 or _too_wide(lines, size * squeeze)):
            content = content[:-1]
            lines = _lines(rng, content, size * squeeze, SIDE - 6)
        fields += content
        if not lines:
            continue
        left, top = tile % columns * SIDE, tile // columns * SIDE
        widest = max(font.getlength(line) / sx for line in lines)
        x0 = left + 2 + rng.random() * max(0.0, SIDE - 4 - widest)
        y0 = top + 2 + rng.random() * (SIDE - 4 - len(lines) * pitch)
        for n, line in enumerate(lines):
            x = (
                x0
                if rng.random() < 0.7
                else left + 2 + rng.random() * (SIDE - 4 - font.getlength(line) / sx)
            )
            middle = y0 + (n + 0.5) * pitch
            draw.text((x * sx, middle * sy), line, fill=ink, font=font, anchor="lm")
            for k, char in enumerate(line):
                if char != " ":
                    centre = (font.getlength(line[:k]) + font.getlength(line[: k + 1])) / 2
                    glyphs.append(Glyph(tile, x + centre / sx - left, middle - top, char))
        if rng.random() < 0.15:  # a ruled line below the cell's text
            y = y0 + len(lines) * pitch + 1
            draw.line((x0 * sx, y * sy, (x0 + widest) * sx, y * sy), fill=ink)
    if not fields:
        return scene(seed, level, attempt + 1)
    sigma = rng.uniform(0, level.noise)
    if sigma > 0.5:
        noise = np.random.default_rng(seed).standard_normal((height, width, 1), dtype=np.float32)
        image = Image.fromarray(np.clip(np.asarray(image) + sigma * noise, 0, 255).astype(np.uint8))
    return Scene(
        image, (columns, rows), tuple(fields), tuple(_questions(rng, fields, level)), tuple(glyphs)
    )


def _too_wide(lines: list[str], size: float) -> bool:
    """Whether a line would leave its cell; size is the font size in tile pixels, horizontally."""
    return any(_font(round(size * 4)).getlength(line) > SIDE - 5 for line in lines)


def sample(seed: int, level: Level = FULL) -> tuple[Image.Image, list[tuple[str, str]]]:
    """The image of a seed and its (question, answer) pairs."""
    drawn = scene(seed, level)
    return drawn.image, list(drawn.turns)
