"""Members of the family without their weights: true shapes, values drawn on demand from a seed."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.special import ndtri

from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.bundle.token_files import tokenizer_files
from internvl_edge.export.checkpoint.checkpoint import INDEX
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.names import tensor_shapes
from internvl_edge.export.checkpoint.origin import stored_shapes

#: Values drawn at a time.
BLOCK_VALUES = 1 << 24
#: Loud channels of a norm: one in so many, so many times as large.
OUTLIER_EVERY, OUTLIER_GAIN = 512, 20
#: Bytes of a shard that `write_checkpoint` holds in memory.
SHARD_BYTES = 1 << 30


class DrawnTensors:
    """Tensors by name: matrices normal by fan-in, norms around one, the same for the same seed.

    Every `OUTLIER_EVERY`-th channel of a norm is `OUTLIER_GAIN` times as large, which gives the
    linear layers behind it the loud input channels that InternViT-6B is known for.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._seed = seed
        self._shapes = shapes
        # Drawing 16 random bits and looking the quantile up takes 3 ns a value, a normal draw 10.
        levels = 1 << 16
        self._normal = ndtri((np.arange(levels) + 0.5) / levels).astype(np.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def blocks(self, name: str) -> Iterator[NDArray[np.generic]]:
        shape = self._shapes[name]
        step = max(1, BLOCK_VALUES // int(np.prod(shape[1:])))
        starts = range(0, shape[0], step)
        draw = partial(self._draw, name)
        with ThreadPoolExecutor(1) as pool:  # draws the next block while this one is used
            following = pool.submit(draw, 0, min(step, shape[0]))
            for start in starts:
                block = following.result()
                if start + step < shape[0]:
                    following = pool.submit(draw, start + step, min(start + 2 * step, shape[0]))
                yield block

    def _draw(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        shape = (stop - start, *self._shapes[name][1:])
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode()), start])
        values: NDArray[np.float32] = self._normal[
            random.integers(0, len(self._normal), shape, np.uint16)
        ]
        if len(shape) > 1:
            values *= np.float32(np.prod(shape[1:]) ** -0.5)
            return values
        if not name.endswith("weight"):
            return np.asarray(np.float32(0.1) * values)
        gains: NDArray[np.float32] = 1 + np.float32(0.1) * values
        gains[(start + np.arange(len(gains))) % OUTLIER_EVERY == 0] *= OUTLIER_GAIN
        return gains


class SyntheticWeights(DrawnTensors):
    """A weight source of drawn tensors.

    The tokenizer is the bundled example's: a small vocabulary whose ids all exist in the large one.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        super().__init__(tensor_shapes(spec), seed)
        self.spec = spec
        self.directory = example_room() / "checkpoint"

    @property
    def identity(self) -> list[str]:
        return [f"synthetic, seed {self._seed}"]

    def as_stored(self, name: str) -> Iterator[NDArray[np.generic]]:
        return self.blocks(name)

    def order(self, name: str) -> NDArray[np.int64] | None:
        return None

    def origin(self, name: str) -> str:
        return name


def write_checkpoint(name: str, directory: Path, seed: int = 0) -> Path:
    """Write a member of `CONFIGS` as a checkpoint directory: bfloat16 shards, index, tokenizer.

    Args:
        directory: to create.
    """
    config = CONFIGS[name]
    described = describe_config(config)
    shapes = stored_shapes(described.tensors(), tensor_shapes(described.spec))
    source = DrawnTensors(shapes, seed)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in tokenizer_files(example_room() / "checkpoint"):
        shutil.copyfile(path, directory / path.name)
    shards = _shards(shapes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: np.concatenate([block.astype(ml_dtypes.bfloat16) for block in source.blocks(key)])
            for key in names
        }
        save_file(tensors, directory / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return directory


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Tensor names in order, cut where a shard is full."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if held and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
