"""A deterministic generator of calibration pictures: no downloads, no licences to clear.

Documents, tables, receipts, charts, screens and photo-like textures, with questions and answers in
English and Chinese. Text in the pictures is Latin (Pillow's built-in font); the aim is activations
of realistic range in every layer, not reading.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from internvl_edge.calib_data.items import Item

_WORDS = """
    invoice total amount due date paid order number customer address item price quantity tax
    discount balance report quarter revenue growth margin forecast network device sensor voltage
    current temperature pressure warning system update install version error retry cancel
"""

_QUESTIONS = (
    ("What is written in the image?", "The image shows {}."),
    ("Please describe the image in detail.", "It contains the following: {}."),
    ("Read the first line.", "{}"),
    ("请描述这张图片。", "图片中的内容是：{}。"),
    ("图中写了什么？", "图中写着：{}。"),
)

_Draw = Callable[[random.Random], tuple[Image.Image, str]]


def generate(count: int, seed: int = 0) -> list[Item]:
    """`count` items, the same for the same seed; kinds and languages take turns."""
    kinds: tuple[_Draw, ...] = (_document, _table, _receipt, _chart, _screen, _texture)
    items = []
    for index in range(count):
        chance = random.Random(f"{seed}/{index}")
        image, content = kinds[index % len(kinds)](chance)
        question, answer = _QUESTIONS[(index // len(kinds) + index) % len(_QUESTIONS)]
        items.append(Item(image, question, answer.format(content)))
    return items


def _page(
    chance: random.Random, width: int, height: int
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    shade = chance.randint(225, 255)
    image = Image.new("RGB", (width, height), (shade, shade, chance.randint(215, 255)))
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(_WORDS.split()) for _ in range(count))


def _amount(chance: random.Random) -> str:
    return f"{chance.uniform(1, 9999):,.2f}"


def _document(chance: random.Random) -> tuple[Image.Image, str]:
    image, draw = _page(chance, 900, 1200)
    title = _words(chance, 3).title()
    draw.text((60, 50), title, fill=(10, 10, 30), font=_font(44))
    for line in range(28):
        draw.text((60, 140 + 36 * line), _words(chance, 8), fill=(30, 30, 30), font=_font(22))
    return image, title


def _table(chance: random.Random) -> tuple[Image.Image, str]:
    image, draw = _page(chance, 1100, 700)
    rows, columns = chance.randint(5, 10), chance.randint(3, 5)
    first = ""
    for row in range(rows):
        for column in range(columns):
            box = (40 + 200 * column, 40 + 58 * row, 240 + 200 * column, 98 + 58 * row)
            fill = (210, 220, 240) if row == 0 else None
            draw.rectangle(box, outline=(90, 90, 90), fill=fill)
            text = _words(chance, 1) if row == 0 or column == 0 else _amount(chance)
            first = first or text
            draw.text((box[0] + 12, box[1] + 14), text, fill=(0, 0, 0), font=_font(24))
    return image, first


def _receipt(chance: random.Random) -> tuple[Image.Image, str]:
    image, draw = _page(chance, 480, 960)
    total = _amount(chance)
    for line in range(14):
        y = 60 + 48 * line
        draw.text((30, y), _words(chance, 2), fill=(20, 20, 20), font=_font(24))
        draw.text((330, y), _amount(chance), fill=(20, 20, 20), font=_font(24))
    draw.line((30, 760, 450, 760), fill=(0, 0, 0), width=3)
    draw.text((30, 790), f"TOTAL {total}", fill=(0, 0, 0), font=_font(40))
    return image, f"TOTAL {total}"


def _chart(chance: random.Random) -> tuple[Image.Image, str]:
    image, draw = _page(chance, 1000, 640)
    title = _words(chance, 2).title()
    draw.text((60, 24), title, fill=(0, 0, 0), font=_font(34))
    for bar in range(8):
        height = chance.randint(40, 420)
        colour = tuple(chance.randint(30, 220) for _ in range(3))
        draw.rectangle((90 + 108 * bar, 560 - height, 160 + 108 * bar, 560), fill=colour)
        draw.text((96 + 108 * bar, 572), str(2010 + bar), fill=(0, 0, 0), font=_font(22))
    draw.line((70, 560, 960, 560), fill=(0, 0, 0), width=2)
    return image, title


def _screen(chance: random.Random) -> tuple[Image.Image, str]:
    image, draw = _page(chance, 1280, 720)
    draw.rectangle((0, 0, 1280, 56), fill=(40, 60, 110))
    name = _words(chance, 2).title()
    draw.text((24, 12), name, fill=(255, 255, 255), font=_font(28))
    for row in range(4):
        for column in range(5):
            left, top = 40 + 245 * column, 90 + 150 * row
            colour = tuple(chance.randint(120, 240) for _ in range(3))
            draw.rounded_rectangle((left, top, left + 215, top + 120), 16, fill=colour)
            draw.text((left + 18, top + 44), _words(chance, 1), fill=(0, 0, 0), font=_font(26))
    return image, name


def _texture(chance: random.Random) -> tuple[Image.Image, str]:
    """Sums of noise at several scales: a photograph's spectrum, without a photograph."""
    noise = np.random.default_rng(chance.randrange(2**32))
    total = np.zeros((480, 640, 3))
    for octave in range(6):
        size = (2 ** (octave + 2), 2 ** (octave + 2), 3)
        coarse = (noise.random(size) * 255).astype(np.uint8)
        layer = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float64) / 2**octave
    total = (total - total.min()) / (total.max() - total.min()) * 255
    return Image.fromarray(total.astype(np.uint8)), "a texture"
