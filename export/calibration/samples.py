"""Calibration items to what the model sees: tiles and token ids, as a conversation would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internvl_edge.bundle.prompt import expand_images, get_template, place_images
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.bundle.tokenizer import Tokenizer
from internvl_edge.calib_data.items import Item
from internvl_edge.export.calibration.calibrate import Sample
from internvl_edge.runtime.images.preprocess import Tiling, tile_on_host

#: Items drawn from the generator when the user brings no data.
DEFAULT_ITEMS = 24
#: Most tiles of a calibration picture: the 26B tower costs 12 TFLOP a tile.
MAX_TILES = 6


def make_samples(spec: ModelSpec, tokenizer: Tokenizer, items: Sequence[Item]) -> list[Sample]:
    """One sample per item: prompt, image slots and answer in one sequence."""
    template = get_template(spec.prompt.template)
    tiling = Tiling(
        tile_size=spec.vision.tile_size,
        min_tiles=1,
        max_tiles=min(MAX_TILES, spec.tiling.max_tiles) if spec.tiling.dynamic else 1,
        thumbnail=spec.tiling.thumbnail,
        resize=spec.tiling.resize,
    )
    samples = []
    for item in items:
        tiles, _ = tile_on_host(item.image, tiling)
        rows = len(tiles) * spec.vision.tokens_per_tile
        question = expand_images(place_images(item.prompt, 1, 0), iter([rows]))
        text = template.render([(question, item.answer or None)], spec.prompt.system_message)
        ids = tokenizer.encode(text)[: spec.language.max_position_embeddings]
        samples.append(Sample(tiles, np.asarray(ids, np.int64)))
    return samples
