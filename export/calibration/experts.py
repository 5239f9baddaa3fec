"""What goes on inside the experts of a layer, which one operator computes unseen.

Here each expert's matrices are read one after another, and see the rows that the router gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internvl_edge.export.calibration.ranges import INPUT, OUTPUT, RangeCollector
from internvl_edge.export.checkpoint.weights import Weight
from internvl_edge.export.formats.quantize import Floats
from internvl_edge.export.graphs.dialects import Experts


@dataclass(frozen=True)
class Visit:
    """What one expert computes of the rows it is given, of which there may be none.

    Attributes:
        gate_up, down: its matrices, as of `Experts`.
        x: float32 `(rows, hidden)`, what it reads.
        gated: float32 `(rows, 2 * width)`, columns of gate and up in turns.
        inner: float32 `(rows, width)`, `silu(gate) * up`.
    """

    gate_up: Floats
    down: Floats
    x: Floats
    gated: Floats
    inner: Floats

    @property
    def result(self) -> Floats:
        """What it gives, before it is weighted: float32 `(rows, hidden)`."""
        return self.inner @ self.down.T


class ExpertInputs:
    """Keeps what a layer's experts and their router are given, over many runs.

    Attributes:
        experts: of the layer; None until its graph is written.
    """

    def __init__(self) -> None:
        self.experts: Experts | None = None
        self._x: list[Floats] = []
        self._logits: list[Floats] = []

    def add(self, x: Floats, logits: Floats) -> None:
        """Take in rows `(rows, hidden)` and what the router says of them `(rows, experts)`."""
        self._x.append(x)
        self._logits.append(logits)

    def visits(self) -> Iterator[Visit]:
        """Go through the experts in order.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        if (experts := self.experts) is None:
            return
        x, logits = np.concatenate(self._x), np.concatenate(self._logits)
        # Of equals the first, as the reference takes them.
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, : experts.per_token]
        count = experts.router.shape[0]
        matrices = zip(_matrices(experts.gated, count), _matrices(experts.down, count), strict=True)
        for expert, (gate_up, down) in enumerate(matrices):
            yield _visit(gate_up, down, x[(chosen == expert).any(axis=1)])

    def measure(self, ranges: RangeCollector) -> None:
        """Show how large values get; what they read, the router reads as well."""
        if (experts := self.experts) is None:
            return
        for visit in self.visits():
            ranges.see(OUTPUT, experts.gated.name, visit.gated)
            ranges.see(INPUT, experts.down.name, visit.inner)
            ranges.see(OUTPUT, experts.down.name, visit.result)


def _visit(gate_up: Floats, down: Floats, x: Floats) -> Visit:
    both = x @ gate_up.T
    gate, up = both[:, ::2], both[:, 1::2]
    with np.errstate(over="ignore"):  # a quotient by infinity is the 0 that is meant
        inner = gate / (1 + np.exp(-gate)) * up
    return Visit(gate_up, down, x, both, inner)


def _matrices(weight: Weight, count: int) -> Iterator[Floats]:
    """One matrix after another of `count` that a tensor `(count * rows, columns)` holds."""
    rows = weight.shape[0] // count
    held = np.empty((0, weight.shape[1]), np.float32)
    for block in weight.cast_blocks():
        held = np.concatenate([held, block])
        while len(held) >= rows:
            yield held[:rows]
            held = held[rows:]
