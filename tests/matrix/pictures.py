"""Generated pictures, as tiles: what is encoded on every kind of CPU beside the demo's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from internvl_edge.calib_data.generator import generate

COUNT, SIDE = 24, 112


def write_pictures(path: Path) -> None:
    """Write uint8 `(COUNT, SIDE, SIDE, 3)`, one tile of each picture."""
    pictures = [item.image.convert("RGB").resize((SIDE, SIDE)) for item in generate(COUNT)]
    np.save(path, np.stack([np.asarray(picture) for picture in pictures]))
