"""Quantised weights as the tensors a graph stores: computed once, written one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.contract import embedding_runs
from internvl_edge.bundle.errors import OptionsError
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.plan import LinearPlan
from internvl_edge.export.formats.quantize import (
    BlockFormat,
    Blocks,
    Floats,
    quantize_blocks,
    quantize_channels,
)

Arrays = tuple[NDArray[np.generic], ...]

#: Values a thread quantises at a time: small enough that they and their copies stay in cache.
CHUNK_VALUES = 1 << 18
THREADS = 4


@dataclass(frozen=True)
class Part:
    """One of the tensors a quantised weight becomes."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class Packed:
    """The parts of one quantised weight.

    The matrix is read and quantised when its first part is written, and forgotten after its last:
    at most one quantised matrix is held, and of the float matrix only a run of rows.
    """

    def __init__(
        self,
        weight: Weight,
        parts: list[Part],
        quantize: Callable[[Floats], Arrays],
        finish: Callable[[list[NDArray[np.generic]]], list[NDArray[np.generic]]] = list,
    ) -> None:
        self._weight = weight
        self._quantize = quantize
        self._finish = finish
        self._parts = parts
        self._held: list[NDArray[np.generic]] = []

    def weights(self) -> list[Weight]:
        """One `Weight` per part; they must be written in this order, one after another."""
        return [
            Weight(f"{self._weight.name}{part.suffix}", part.dtype, part.shape, partial(self._take))
            for part in self._parts
        ]

    def _take(self) -> Iterator[NDArray[np.generic]]:
        if not self._held:
            self._held = self._compute()
        yield self._held.pop(0)

    def _compute(self) -> list[NDArray[np.generic]]:
        rows, columns = self._weight.shape
        step = max(1, CHUNK_VALUES // columns)
        whole: list[NDArray[np.generic]] = []
        done = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for block in self._weight.cast_blocks():
                runs = [block[i : i + step] for i in range(0, len(block), step)]
                for arrays in pool.map(self._quantize, runs):
                    # Kept, thousands of small arrays would leave holes as large as the matrix.
                    whole = whole or [np.empty((rows, *a.shape[1:]), a.dtype) for a in arrays]
                    for place, array in zip(whole, arrays, strict=True):
                        place[done : done + len(array)] = array
                    done += len(arrays[0])
        return self._finish(whole)


def pack_blocks(weight: Weight, plan: LinearPlan) -> list[Weight]:
    """Tensors for MatMulNBits: packed values, scales and, when asymmetric, zero points."""
    form = _form(plan)
    if plan.packed is not None:
        return _made(weight, plan.packed)
    rows, columns = weight.shape
    count = form.blocks(columns)
    parts = [
        Part("", "uint8", (rows, count, form.block * form.bits // 8)),
        Part(".scales", "float32", (rows, count)),
    ]
    if not form.symmetric:
        parts.append(Part(".zero_points", "uint8", (rows, -(-count * form.bits // 8))))

    def quantize(block: Floats) -> Arrays:
        packed = quantize_blocks(block, form, importance=plan.importance, ratios=plan.ratios)
        arrays = (packed.packed, packed.scales)
        return arrays if packed.zero_points is None else (*arrays, packed.zero_points)

    return Packed(weight, parts, quantize).weights()


def _made(weight: Weight, blocks: Blocks) -> list[Weight]:
    """Return the tensors of blocks that calibration has made."""
    parts: list[tuple[str, NDArray[np.generic] | None]] = [
        ("", blocks.packed),
        (".scales", blocks.scales),
        (".zero_points", blocks.zero_points),
    ]
    return [
        Weight.held(f"{weight.name}{suffix}", array) for suffix, array in parts if array is not None
    ]


@dataclass(frozen=True)
class Channels:
    """Tensors of one QGemm: int8 values, one scale per row, the bias in the product's int32."""

    values: Weight
    scales: Weight
    bias: Weight


def pack_channels(
    weight: Weight,
    bias: Weight | None,
    plan: LinearPlan,
    gain: Weight | None = None,
    parts: int = 1,
) -> list[Channels]:
    """Tensors for `parts` QGemms, each with a run of the weight's rows.

    A gain `(rows,)` goes into the scales, the only place where QGemm leaves the integers: exact
    for any sign and for zero.
    """
    rows, columns = weight.shape
    made = []
    for i, run in enumerate(np.array_split(np.arange(rows), parts)):
        place = f".{i}" if parts > 1 else ""
        made += [
            Part(place, "int8", (len(run), columns)),
            Part(f"{place}.scales", "float32", run.shape),
            Part(f"{place}.bias", "int32", run.shape),
        ]

    def finish(arrays: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        values, scales = arrays
        added = np.zeros(rows) if bias is None else _whole(bias)
        # A row of zeros may have any scale: one that holds its bias to 24 bits.
        empty = ~values.any(axis=1)
        fine = np.maximum(np.abs(added), 1e-6) / (plan.input_scale * 2**24)
        product_scales: Floats = np.where(empty, fine, scales).astype(np.float32)
        steps = np.rint(added / (product_scales.astype(np.float64) * plan.input_scale))
        limits = np.iinfo(np.int32)
        if gain is not None:
            product_scales = product_scales * _whole(gain)
        int32_bias = np.clip(steps, limits.min, limits.max).astype(np.int32)
        split = (np.array_split(array, parts) for array in (values, product_scales, int32_bias))
        return [array for run in zip(*split, strict=True) for array in run]

    packed = Packed(weight, made, quantize_channels, finish).weights()
    return [Channels(*packed[i : i + 3]) for i in range(0, len(packed), 3)]


def pack_table(weight: Weight) -> list[Weight]:
    """Tensors for an embedding table: int8 values and float32 scales per run of a row."""
    rows, columns = weight.shape
    runs = embedding_runs(columns)
    parts = [Part("", "int8", weight.shape), Part(".scales", "float32", (rows, runs))]

    def quantize(block: Floats) -> Arrays:
        values, scales = quantize_channels(block.reshape(-1, columns // runs))
        return values.reshape(block.shape), scales.reshape(-1, runs)

    return Packed(weight, parts, quantize).weights()


def _whole(weight: Weight) -> Floats:
    return np.concatenate(list(weight.cast_blocks())).astype(np.float32)


def _form(plan: LinearPlan) -> BlockFormat:
    if plan.form is None:
        raise OptionsError("a block-quantised layer needs a block format")
    return plan.form
