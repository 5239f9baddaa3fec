"""What export does to each weight: the decisions of a quantisation, as data.

A plan says for every linear layer how it is stored, which rows and columns are rescaled first
(SmoothQuant, AWQ: exact in real arithmetic, kinder to the rounding), and the scales of the KV
cache. An empty plan leaves the model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.formats.quantize import CLIP_RATIOS, BlockFormat, Blocks, Floats

Kind = Literal["float", "fp16", "int8", "blocks"]


@dataclass(frozen=True)
class LinearPlan:
    """The stored form of one linear layer, and how it is run.

    Attributes:
        kind: "float" in the graph's own precision, "fp16" kept at half precision in a quantised
            graph, "int8" W8A8, "blocks" weight only.
        form: of the blocks.
        input_scale: of the int8 activations, from calibration.
        input_factors: float32 `(in,)` the input is multiplied by first, where no earlier weight
            could take the factors up.
        importance: float32 `(in,)`, mean square of each input after rescaling; steers clipping.
        ratios: clipping candidates; `(1.0,)` is plain round to nearest.
        packed: the quantised blocks themselves, where calibration has made them (GPTQ).
    """

    kind: Kind
    form: BlockFormat | None = None
    input_scale: float = 0.0
    input_factors: Floats | None = None
    importance: Floats | None = None
    ratios: tuple[float, ...] = CLIP_RATIOS
    packed: Blocks | None = None


@dataclass(frozen=True)
class CacheScales:
    """Scales of one layer's int8 keys and values, float32 `(kv_heads, head_dim)` each."""

    key: Floats
    value: Floats


@dataclass(frozen=True)
class QuantPlan:
    """Decisions for a whole model; tensors go by their canonical names.

    Attributes:
        row_factors: float32 `(out,)` by tensor: its rows are multiplied by them.
        column_factors: float32 `(in,)` by tensor: its columns are multiplied by them.
        wide: weights of the linear layers whose result leaves float16's range or precision; a
            graph that computes in float16 runs them with a float32 result.
    """

    linears: Mapping[str, LinearPlan] = field(default_factory=dict)
    row_factors: Mapping[str, Floats] = field(default_factory=dict)
    column_factors: Mapping[str, Floats] = field(default_factory=dict)
    cache: Mapping[int, CacheScales] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()


class RescaledSource:
    """A weight source whose tensors come with a plan's factors applied, in float32."""

    def __init__(self, source: WeightSource, plan: QuantPlan) -> None:
        self.spec: ModelSpec = source.spec
        self._source = source
        self._plan = plan

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def origin(self, name: str) -> str:
        return self._source.origin(name)

    def blocks(self, name: str) -> Iterator[NDArray[np.generic]]:
        rows = self._plan.row_factors.get(name)
        columns = self._plan.column_factors.get(name)
        if rows is None and columns is None:
            yield from self._source.blocks(name)
            return
        start = 0
        for block in self._source.blocks(name):
            wide = block.astype(np.float32)
            if columns is not None:
                wide *= columns
            if rows is not None:
                part = rows[start : start + len(wide)]
                wide *= part.reshape(-1, *[1] * (wide.ndim - 1))
            start += len(wide)
            yield wide
