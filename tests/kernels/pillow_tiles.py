"""What several versions of Pillow make of the same images: run under each to extend the JSON.

pip install --target /tmp/pillow pillow==10.4.0
PYTHONPATH=/tmp/pillow python tests/kernels/pillow_tiles.py
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def noise(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """RGB noise `(height, width, 3)`: every rounding is exercised, and saturation too."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Case:
    """An image of noise and the side of the square it is resized to."""

    width: int
    height: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}-{self.side}"

    def pixels(self) -> NDArray[np.uint8]:
        return noise(self.width, self.height, self.width * 10_000 + self.height)


CASES = [
    Case(width, height, side)
    for width, height in ((1, 1), (1, 700), (900, 1), (64, 48), (333, 777), (1000, 37), (448, 900))
    for side in (28, 224, 448)
]


def main() -> None:
    """Add the hashes of the Pillow that is installed."""
    import PIL
    from PIL import Image

    path = Path(__file__).with_name("pillow_tiles.json")
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[PIL.__version__] = {
        case.name: hashlib.sha256(
            Image.fromarray(case.pixels())
            .resize((case.side, case.side), Image.Resampling.BICUBIC)
            .tobytes()
        ).hexdigest()
        for case in CASES
    }
    path.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
