"""Engines of models with random weights, for the GPU suite: built, loaded, timed."""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.limits import Weights
from internvl_edge.bench.common.roofline import Work
from internvl_edge.bench.scale.synthetic import BLOCK_VALUES
from internvl_edge.bundle.contract import (
    DialectName,
    LanguagePrecision,
    VisionPrecision,
    compute_dtype,
)
from internvl_edge.bundle.extras import example_room
from internvl_edge.bundle.manifest import Bundle, open_bundle
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.bundle.token_files import tokenizer_files
from internvl_edge.export.calibration.decisions import Decisions, Recipe
from internvl_edge.export.checkpoint.names import EMBEDDING, is_language, tensor_shapes
from internvl_edge.export.tensorrt.builder import build_in_process
from internvl_edge.export.tensorrt.engines import Build, build_engines
from internvl_edge.export.tensorrt.profiles import limits_of, plan_build, this_place
from internvl_edge.export.writer import write_bundle
from internvl_edge.runtime.backends import Backend, Cache, Slice
from internvl_edge.runtime.backends.cuda import Cuda
from internvl_edge.runtime.backends.tensorrt import TensorRtBackend
from internvl_edge.runtime.backends.tensorrt_library import Library

#: Of activations, whose largest is about four: random weights keep them near one.
INPUT_SCALE = 4 / 127
#: Random numbers that weights are taken from: four times as many as are taken at a time.
POOL_VALUES = 4 * BLOCK_VALUES
#: Bytes between the beginnings of two matrices in the run of random bytes.
STRIDE = 4099


@dataclass(frozen=True)
class Workshop:
    """A GPU and the TensorRT that makes engines for it.

    Attributes:
        folder: for bundles; they are as large as the models.
        build: builds one graph.
    """

    cuda: Cuda
    library: Library
    folder: Path
    build: Build = build_in_process

    @classmethod
    def open(cls, folder: Path) -> Workshop:
        """Open the GPU that is here, with the TensorRT that is installed.

        Raises:
            DeviceError: one of them is not.
        """
        return cls(Cuda.open(), Library.open(), folder)

    @property
    def dialect(self) -> DialectName:
        """The better one the library takes."""
        return "tensorrt" if self.library.api.modern else "tensorrt-portable"

    def bundle(
        self, spec: ModelSpec, vision: VisionPrecision, language: LanguagePrecision
    ) -> Bundle:
        """A bundle of random weights: speed does not depend on them."""
        recipe = Recipe(vision, language, "fp16", dialect=self.dialect)
        path = self.folder / f"{vision}-{language}-{spec.vision.layers_run}"
        source = PooledWeights(spec)
        tokenizer = tokenizer_files(source.directory)
        write_bundle(source, path, recipe, random_decisions(spec, recipe), tokenizer=tokenizer)
        return open_bundle(path, verify="size")

    def load(self, bundle: Bundle, context: int | None = None) -> TensorRtBackend:
        """Build a bundle's engines for this GPU and load them."""
        place = this_place(self.cuda, self.library)
        limits = limits_of(bundle.spec, None, context)
        memory = plan_build(bundle, limits, place)
        engines = build_engines(
            bundle, place, limits, memory, self.library, overwrite=True, build=self.build
        )
        return TensorRtBackend(bundle, self.cuda, self.library, engines)


def cut(spec: ModelSpec, vision: int, language: int) -> ModelSpec:
    """A model with so many layers in each part, at full width."""
    return replace(
        spec,
        vision=replace(spec.vision, num_hidden_layers=vision),
        language=replace(spec.language, num_hidden_layers=language),
    )


def random_decisions(spec: ModelSpec, recipe: Recipe) -> Decisions:
    """One scale for all activations; 4-bit weights drawn as they are stored.

    Rounding 4-bit blocks takes 7 s a decoder layer on four cores. Here each matrix is a stretch of
    one run of random bytes, at an offset of its own, so that no two are alike.
    """
    random, decisions = np.random.default_rng(0), Decisions()
    shapes = {n: s for n, s in tensor_shapes(spec).items() if len(s) == 2 and n != EMBEDDING}
    blocked = [n for n in shapes if recipe.language == "int4" and is_language(n)]
    for name in shapes:
        decisions[f"scale:{name}"] = np.array(INPUT_SCALE, np.float32)
        decisions[f"square:{name}"] = np.ones(shapes[name][1], np.float32)
    blocked = [name for name in blocked if recipe.block_form(name).bits == 4]
    if not blocked:
        return decisions
    values = max(rows * columns for rows, columns in (shapes[name] for name in blocked))
    drawn = random.integers(0, 256, values // 2 + STRIDE * len(blocked), np.uint8)
    for index, name in enumerate(blocked):
        (rows, columns), block = shapes[name], recipe.language_form.block
        begin, shape = index * STRIDE, (rows, columns // block, block // 2)
        stored = drawn[begin : begin + rows * columns // 2]
        decisions[f"packed:{name}"] = stored.reshape(shape)
        # A nibble's deviation is 4.6: weights of deviation fan-in ** -0.5.
        scale = np.float32(columns**-0.5 / 4.6)
        decisions[f"packed_scales:{name}"] = np.broadcast_to(scale, shape[:2])
    return decisions


def random_tiles(spec: ModelSpec, count: int) -> NDArray[np.uint8]:
    """uint8 `(count, S, S, 3)`."""
    side = spec.vision.tile_size
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class PooledWeights:
    """A weight source without the cost of drawing: stretches of one run of random numbers.

    Matrices have the deviation fan-in ** -0.5, vectors are ones.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.directory = example_room() / "checkpoint"
        self._shapes = tensor_shapes(spec)
        self._pool = np.random.default_rng(0).standard_normal(POOL_VALUES, np.float32)

    @property
    def identity(self) -> list[str]:
        return ["pooled"]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def origin(self, name: str) -> str:
        return name

    def as_stored(self, name: str) -> Iterator[NDArray[np.generic]]:
        return self.blocks(name)

    def order(self, name: str) -> NDArray[np.int64] | None:
        return None

    def blocks(self, name: str) -> Iterator[NDArray[np.generic]]:
        rows, *rest = self._shapes[name]
        if not rest:
            yield np.ones(rows, np.float32)
            return
        width = math.prod(rest)
        step = max(1, BLOCK_VALUES // width)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            room = POOL_VALUES - count * width
            begin = zlib.crc32(f"{name} {start}".encode()) % room
            drawn = self._pool[begin : begin + count * width]
            yield (drawn * np.float32(width**-0.5)).reshape(count, *rest)


class Sequence:
    """Random rows through a backend's decoder: the same for every backend."""

    def __init__(self, backend: Backend, bundle: Bundle, context: int) -> None:
        manifest, self._spec = bundle.manifest, bundle.spec.language
        self._backend = backend
        self._dtype = compute_dtype(manifest.language, manifest.dialect)
        self._random = np.random.default_rng(0)
        self.cache: Cache = backend.new_cache(context)

    def run(self, tokens: int) -> NDArray[np.float32]:
        """One pass; the logits of its last row `(vocab,)`."""
        shape = (tokens, self._spec.hidden_size)
        rows = self._random.standard_normal(shape, np.float32).astype(self._dtype)
        theta = self._spec.rope_theta
        new = Slice(self.cache, rows, theta, np.array([tokens - 1]))
        logits = self._backend.forward([new])
        self.cache.state.extend(np.zeros(tokens, np.int64), theta)
        return np.asarray(logits[0])


def median_seconds(run: Callable[[], Any], repeat: int, warmup: int = 2) -> float:
    """Return the median seconds of one call that waits for its result."""
    times = []
    for index in range(warmup + repeat):
        start = time.perf_counter()
        run()
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name: str, seconds: float, work: Work) -> dict[str, Any]:
    """One figure: what was done, in what time; shares of the ceilings are added later."""
    return {
        "name": name,
        "seconds": seconds,
        "linear_operations": work.linear,
        "attention_operations": work.attention,
        "read_bytes": work.read_bytes,
    }


def weights_of(bundle: Bundle) -> Weights:
    """Return a bundle's weights for the roofline."""
    return Weights.of(bundle.manifest)
