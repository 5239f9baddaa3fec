"""Layers of experts, and whether results are those of their definition."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.blocks import reference

#: Rows, hidden, width, experts, chosen, block: one expert or all, rows for some experts or none.
SHAPES = (
    *((1, 64, 32, 4, 2, 32), (3, 128, 256, 8, 3, 64), (2, 256, 128, 1, 1, 128)),
    *((7, 32, 96, 5, 5, 32), (40, 256, 256, 16, 4, 256), (60, 64, 64, 3, 1, 32)),
)


@dataclass(frozen=True)
class Experts:
    """The arguments of `reference.mix_experts`."""

    x: NDArray[np.float32]
    logits: NDArray[np.float32]
    gated: tuple[NDArray[np.uint8], NDArray[np.float32]]
    down: tuple[NDArray[np.uint8], NDArray[np.float32]]
    chosen: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, hidden, width, experts, chosen, block, bits."""
        experts, columns, _, size = self.gated[0].shape
        block = size * 8 // self.bits
        return (*self.x.shape, columns // 2, experts, self.chosen, block, self.bits)

    @property
    def wanted(self) -> NDArray[np.float64]:
        given = self.x, self.logits, self.gated, self.down
        return reference.mix_experts(*given, chosen=self.chosen, bits=self.bits)


def layer(
    rows: int, hidden: int, width: int, experts: int, chosen: int, block: int, bits: int
) -> Experts:
    """Return a layer of random weights."""
    random = np.random.default_rng([rows, hidden, width, experts, chosen, block, bits])

    def stack(columns: int, inputs: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        shape = (experts, columns, inputs // block)
        values = random.integers(0, 256, (*shape, block * bits // 8), np.uint8)
        size = np.float32(inputs**-0.5 / 2 ** (bits - 2))
        return values, random.random(shape, np.float32) * size

    x = random.standard_normal((rows, hidden)).astype(np.float32)
    logits = random.standard_normal((rows, experts)).astype(np.float32)
    return Experts(x, logits, stack(2 * width, hidden), stack(hidden, width), chosen, bits)


def layers() -> list[Experts]:
    return [layer(*shape, bits) for shape, bits in product(SHAPES, (4, 8))]


def check(got: NDArray[np.float32], given: Experts) -> None:
    """Check that a result is that of the definition, but where a value of an expert lay between two
    integers and was rounded to the other one, as its last bit may make it."""
    wanted = given.wanted
    difference = np.abs(got - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)
    assert np.median(difference) < 2e-6
    assert difference.max() < 5e-3
