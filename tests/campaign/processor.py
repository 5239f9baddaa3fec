"""Pictures as transformers' image processor cuts them: what `-hf` checkpoints are asked with.

    cd tests && python -m campaign.processor

writes `tests/golden/processor_tiles.json`. It needs transformers and torchvision, and nothing of
this project. The class is the one that `AutoImageProcessor` takes where torchvision is installed,
whichever one a checkpoint's files name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden" / "processor_tiles.json"
CASES = 120
#: Largest sides of pictures, and sides of tiles; small ones are drawn as often as large ones.
LARGEST, SIDES = (40, 300, 900, 2400), (28, 56, 56, 448)
#: As older files name it, newer ones, and those of the other backend.
NAMES = ("GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast", "GotOcr2ImageProcessorPil")


@dataclass(frozen=True)
class Case:
    """A picture, and how it is cut.

    Attributes:
        seed: of its pixels; those of even ones are noise, of odd ones soft.
        width, height: in pixels.
        side: of a tile.
        max_tiles: thumbnail not counted.
    """

    seed: int
    width: int
    height: int
    side: int
    max_tiles: int

    def pixels(self) -> NDArray[np.uint8]:
        """Return the picture, uint8 `(height, width, 3)`."""
        random = np.random.default_rng(self.seed)
        noise = random.integers(0, 256, (self.height, self.width, 3), np.uint8)
        if self.seed % 2 == 0:
            return noise
        ramp = np.add.outer(np.arange(self.height) * 3, np.arange(self.width)) % 240
        return (ramp[..., np.newaxis] + noise % 16).astype(np.uint8)


def cases() -> list[Case]:
    """Return the pictures that are tried, always the same."""
    found = []
    for seed in range(CASES):
        chance = random.Random(f"picture {seed}")
        largest = chance.choice(LARGEST)
        size = chance.randint(1, largest), chance.randint(1, largest)
        side, most = chance.choice(SIDES), chance.choice((1, 2, 6, 12, 12, 40))
        found.append(Case(seed, *size, side, min(most, 12) if side == 448 else most))
    return found


def digest(tiles: NDArray[np.uint8]) -> str:
    """Name tiles, uint8 `(tiles, side, side, 3)`."""
    held = np.ascontiguousarray(tiles)
    return hashlib.sha256(f"{held.shape}".encode() + held.tobytes()).hexdigest()[:32]


def processor(case: Case, name: str) -> Any:
    """Return what transformers makes of a checkpoint's files."""
    from transformers import AutoImageProcessor

    told = {
        "image_processor_type": name,
        "size": {"height": case.side, "width": case.side},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": case.max_tiles,
        "resample": 3,
        "do_convert_rgb": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(told))
        return AutoImageProcessor.from_pretrained(folder)


def expected(case: Case) -> NDArray[np.uint8]:
    """Return the tiles, thumbnail last; what follows, normalising, is left out."""
    model = processor(case, NAMES[case.seed % len(NAMES)])
    assert type(model).__name__ == NAMES[0], "torchvision is not installed"
    picture = Image.fromarray(case.pixels())
    cut = model(picture, do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = np.asarray(cut["pixel_values"])
    assert pixels.dtype == np.uint8
    return pixels.transpose(0, 2, 3, 1)


def main() -> None:
    """Write what all of them become."""
    import torch
    import torchvision
    import transformers

    modules = (torch, torchvision, transformers)
    versions = {module.__name__: module.__version__ for module in modules}
    tiles = [{**asdict(case), "tiles": digest(expected(case))} for case in cases()]
    written = {"versions": versions | {"machine": platform.machine()}, "cases": tiles}
    text = json.dumps(written)
    GOLDEN.write_text(text.replace(', {"seed"', ',\n{"seed"') + "\n")


if __name__ == "__main__":
    main()
