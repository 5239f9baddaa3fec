"""The library of attention: its paths, and one pass on the calling thread."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.operators.library import OperatorLibrary

#: Fields of a row of `sequences` before the addresses of its caches; see `sequence_row`.
PLACE_FIELDS = 4
#: `ive::attention::Kind` by the name of a dtype.
KINDS = {"float32": 0, "float16": 1, "int8": 2}

_ADDRESSES = ("query", "key", "value", "cos", "sin", "key_scales", "value_scales", "out")
_SIZES = (
    *("query_apart", "key_apart", "value_apart", "rows", "heads", "kv_heads", "head"),
    *("count", "fields", "layer"),
)


class Pass(ctypes.Structure):
    """`ive::attention::Pass`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_ADDRESSES, "sequences")),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in ("given", "cached")),
    )


@dataclass(frozen=True)
class CachedSequence:
    """The keys and values of one sequence.

    Attributes:
        keys, values: `(kv_heads, capacity, head)`, float32, float16 or int8; written to.
        cached: positions that are filled.
        rows: new ones.
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    cached: int
    rows: int


@dataclass(frozen=True)
class Rows:
    """The rows of a pass, of one sequence after the other.

    Attributes:
        query: `(rows, heads, head)`, float32 or float16.
        key, value: `(rows, kv_heads, head)`.
        cos, sin: `(rows, head / 2)` of each row's position; None where they are rotated.
        key_scales, value_scales: float32 `(kv_heads, head)`, where caches are int8.
    """

    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    cos: NDArray[Any] | None = None
    sin: NDArray[Any] | None = None
    key_scales: NDArray[np.float32] | None = None
    value_scales: NDArray[np.float32] | None = None


class AttentionLibrary(OperatorLibrary):
    """Attention in a build of the library; see `OperatorLibrary`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "attention")

    def attend(
        self, rows: Rows, sequences: Sequence[CachedSequence], *, path: str
    ) -> NDArray[np.floating]:
        """Write the keys and values of the rows into the caches, and attend to what is there.

        Args:
            path: one of `paths`.

        Returns:
            `(rows, heads, head)`, of the dtype of the rows.

        Raises:
            ValueError: rows and sequences do not fit each other.
            MemoryError: there is no memory for it.
        """
        arrays = [getattr(rows, name) for name in _ADDRESSES[:-1]]
        held = [None if one is None else np.ascontiguousarray(one) for one in arrays]
        (count, heads, head), kv_heads = rows.query.shape, rows.key.shape[1]
        out = np.empty_like(held[0])
        table = np.array([_row(one, place) for one, place in _placed(sequences)], np.int64)
        addresses = [None if one is None else one.ctypes.data for one in (*held, out, table)]
        apart = (heads * head, kv_heads * head, kv_heads * head)
        kinds = (KINDS[str(rows.query.dtype)], KINDS[str(sequences[0].keys.dtype)])
        sizes = (*apart, count, heads, kv_heads, head, *table.shape, 0)
        given = Pass(*addresses, *sizes, *kinds)
        status = self.call("attend", given, path)
        if status == 1:
            raise MemoryError(f"no memory for attention of {count} rows")
        if status:
            raise ValueError(f"{count} rows are not those of {table[:, :PLACE_FIELDS].tolist()}")
        return out


def _placed(sequences: Sequence[CachedSequence]) -> Iterator[tuple[CachedSequence, int]]:
    first = 0
    for one in sequences:
        yield one, first
        first += one.rows


def _row(one: CachedSequence, first: int) -> list[int]:
    place = [first, one.rows, one.cached, one.keys.shape[1]]
    return [*place, one.keys.ctypes.data, one.values.ctypes.data]
