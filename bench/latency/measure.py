"""How fast a bundle is, phase by phase, over a grid of tiles, prompt lengths and answer lengths.

    internvl-edge bench latency BUNDLE ... [--tiles 1 4 13] [--prompt N ...] [--new-tokens N ...]
                                           [--rounds N] [--repeat N] [--json FILE] [--html FILE]

Every run is a whole conversation through the public API: an encoded picture and a question, then
a second question about the same picture. Runs come in rounds: each loads the model anew and goes
over the whole grid, so that the spread holds what differs between processes' memory and minutes
too, and not only between one run and the next. The runtime's own `Timings` say where the time went;
decoding and cutting the picture are timed apart. The stop token is disabled, so that an answer is
as long as asked. The projector is part of the vision graph: `bench latency profile` tells its
share.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter

from PIL import Image

from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.bench.common.summaries import Summary, repeat, summarise
from internvl_edge.bench.kernels.cpu import photo
from internvl_edge.bench.latency.energy import Meter, Reading
from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.specs import MAX_TILES, ModelSpec
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.images.decode import load_image
from internvl_edge.runtime.images.preprocess import select_grid

WORD = " total"
FOLLOW_UP = "And the date?"
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Point:
    """One corner of the grid: tiles (thumbnail included), tokens of question and answer."""

    tiles: int
    text_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Run:
    """One conversation: seconds by phase, gaps between tokens, and how long the prompt was."""

    seconds: dict[str, float]
    gaps: list[float]
    prompt_tokens: int
    energy: Reading | None


@dataclass(frozen=True)
class Measured:
    """All runs of one point, in order.

    Attributes:
        phases: seconds; `itl` pools the gaps of every run.
        energy: of the conversations, or None where the platform does not tell.
    """

    point: Point
    prompt_tokens: int
    phases: dict[str, Summary]
    energy: list[Reading] | None

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.phases["prefill"].median

    @property
    def decode_tokens_per_s(self) -> float:
        """Over all gaps; 0 with answers of one token."""
        gaps = self.phases.get("itl")
        return 1 / gaps.mean if gaps else 0.0


def grid(tiles: Sequence[int], prompt: Sequence[int], new_tokens: Sequence[int]) -> list[Point]:
    """Every combination.

    Raises:
        UsageError: a number below what makes sense.
    """
    for option, values, least in (
        ("--tiles", tiles, 0),
        ("--prompt", prompt, 1),
        ("--new-tokens", new_tokens, 1),
    ):
        if (worst := min(values)) < least:
            raise UsageError(f"{option} has {worst}, it must be at least {least}")
    return [Point(*corner) for corner in product(tiles, prompt, new_tokens)]


def measure_point(
    model: InternVL, point: Point, *, runs: int, warmup: int, meter: Meter | None = None
) -> list[Run]:
    """Run the conversation of one point again and again; warm-up runs leave no trace.

    Raises:
        UsageError: the prompt is too long.
    """
    image = picture(model.spec, point.tiles)
    limit = grid_tiles(model.spec, point.tiles)
    prompt = question(model, point.text_tokens)
    return repeat(
        lambda: converse(model, image, limit, prompt, point.new_tokens, meter),
        runs=runs,
        warmup=warmup,
    )


def collect(point: Point, runs: Sequence[Run]) -> Measured:
    """The runs of one point, summarised phase by phase."""
    phases = {name: summarise([run.seconds[name] for run in runs]) for name in runs[0].seconds}
    if gaps := [gap for run in runs for gap in run.gaps]:
        phases["itl"] = summarise(gaps)
    energy = [run.energy for run in runs if run.energy is not None]
    return Measured(point, runs[0].prompt_tokens, phases, energy or None)


def converse(
    model: InternVL,
    image: bytes | None,
    max_tiles: int | None,
    prompt: str,
    new_tokens: int,
    meter: Meter | None,
) -> Run:
    """One conversation of two turns."""
    seconds: dict[str, float] = {}
    if image is not None:
        started = perf_counter()
        decoded = load_image(image)
        opened = perf_counter()
        model.tile(decoded, max_tiles)
        seconds |= {"decode_image": opened - started, "tile": perf_counter() - opened}
    chat = model.chat(max_tiles=max_tiles)
    images = [] if image is None else [image]
    with nullcontext() if meter is None else meter.measure() as energy:
        timings = chat.send(
            prompt, images, max_new_tokens=new_tokens, ignore_eos=True, sampling=ONE_BY_ONE
        ).timings
    if image is not None:
        seconds["vision"] = timings.vision_s
        seconds["vision_per_tile"] = timings.vision_s / timings.tiles
    seconds["prefill"] = timings.prefill_s
    seconds["ttft"] = timings.ttft_s
    seconds["end_to_end"] = timings.token_s[-1]
    second = chat.send(FOLLOW_UP, max_new_tokens=1, ignore_eos=True, sampling=ONE_BY_ONE).timings
    seconds["second_turn_ttft"] = second.ttft_s
    return Run(seconds, timings.itl_s, timings.prompt_tokens, energy)


def question(model: InternVL, tokens: int) -> str:
    """A text of at most `tokens` tokens (one word at least), the prompt's frame not counted.

    Raises:
        UsageError: there are more than the context holds.
    """
    if tokens > model.max_context:
        raise UsageError(f"--prompt is {tokens}, this model ends at {model.max_context}; lower it")
    words = tokens
    while words > 1 and len(model.tokenizer.encode(WORD * words)) > tokens + 1:  # BOS
        words -= max(1, words // 50)
    return (WORD * words).strip()


def grid_tiles(spec: ModelSpec, tiles: int) -> int | None:
    """`max_tiles` that gives `tiles` in all: the thumbnail comes on top of more than one."""
    if tiles == 0:
        return None
    return tiles - 1 if tiles > 1 and spec.tiling.thumbnail else tiles


def grid_shape(count: int) -> tuple[int, int]:
    """Columns and rows of so many tiles, as square as they can be, wider than high."""
    rows = max(row for row in range(1, int(count**0.5) + 1) if count % row == 0)
    return count // rows, rows


def check_tiles(spec: ModelSpec, tiles: int) -> None:
    """Raise UsageError unless the model cuts `picture` into that many, thumbnail included."""
    count = grid_tiles(spec, tiles)
    if count is None:
        return
    if count > MAX_TILES:
        raise UsageError(f"--tiles {tiles}: at most {MAX_TILES} and a thumbnail")
    side, (columns, rows) = spec.vision.tile_size, grid_shape(count)
    if spec.tiling.dynamic:
        columns, rows = select_grid(
            columns * side,
            rows * side,
            min_tiles=spec.tiling.min_tiles,
            max_tiles=count,
            tile_size=side,
        )
    else:
        columns = rows = 1
    made = columns * rows + (spec.tiling.thumbnail and columns * rows > 1)
    if made != tiles:
        raise UsageError(f"--tiles {tiles}: this model cuts no picture into so many, but {made}")


def picture(spec: ModelSpec, tiles: int) -> bytes | None:
    """A JPEG with the aspect ratio and the pixels of a grid that makes `tiles`; None without."""
    count = grid_tiles(spec, tiles)
    if count is None:
        return None
    columns, rows = grid_shape(count)
    side = spec.vision.tile_size
    image = Image.fromarray(photo(columns * side, rows * side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def bundle_name(path: Path, number: int, paths: Sequence[Path]) -> str:
    """The directory's name, numbered where several bundles have the same one."""
    same = [other for other in paths if other.name == path.name]
    return path.name if len(same) == 1 else f"{path.name} ({number + 1})"
