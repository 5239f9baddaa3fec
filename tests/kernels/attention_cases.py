"""Passes for the attention kernel, random, and whether results are NumPy's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from internvl_edge.kernels.attention import reference
from internvl_edge.kernels.attention.library import CachedSequence, Rows

#: Numbers of heads, and of heads of keys.
HEADS = ((1, 1), (2, 1), (6, 2), (7, 1), (4, 4), (16, 2))
SIZES = (8, 24, 64, 80, 96, 128, 256)
#: Dtypes of rows and of caches.
DTYPES = (("float32", "float32"), ("float32", "int8"), ("float16", "float16"), ("float16", "int8"))
#: Error of the result, as a share of the largest value.
ERRORS = {"float32": 5e-6, "float16": 2e-3}


@dataclass(frozen=True)
class Case:
    """The arguments of a pass; see `AttentionLibrary.attend`."""

    rows: Rows
    sequences: tuple[CachedSequence, ...]

    def copy(self) -> Case:
        """Return it with caches of its own."""
        own = (replace(s, keys=s.keys.copy(), values=s.values.copy()) for s in self.sequences)
        return Case(self.rows, tuple(own))

    def alone(self, index: int) -> Case:
        """Return one of its sequences with its rows."""
        first = sum(one.rows for one in self.sequences[:index])
        new = slice(first, first + self.sequences[index].rows)
        arrays = {
            name: array[new]
            for name in ("query", "key", "value", "cos", "sin")
            if (array := getattr(self.rows, name)) is not None
        }
        return Case(replace(self.rows, **arrays), (self.sequences[index],))


def case(
    places: Sequence[tuple[int, int, int]],
    heads: tuple[int, int] = (6, 2),
    head: int = 64,
    dtypes: tuple[str, str] = ("float32", "float32"),
    rotates: bool = True,
    seed: int = 0,
) -> Case:
    """Return a pass of sequences with these cached positions, new rows, and free positions."""
    random = np.random.default_rng(seed)
    dtype, cached = dtypes
    count, kv_heads = sum(rows for _, rows, _ in places), heads[1]
    query, key, value = (
        random.standard_normal((count, n, head)).astype(dtype) for n in (heads[0], *2 * [kv_heads])
    )
    angles = random.uniform(-4, 4, (count, head // 2))
    tables = [f(angles).astype(dtype) if rotates else None for f in (np.cos, np.sin)]
    scales = [
        random.uniform(0.005, 0.02, (kv_heads, head)).astype(np.float32)
        if cached == "int8"
        else None
        for _ in range(2)
    ]
    sequences = []
    for filled, rows, free in places:
        shape = (kv_heads, filled + rows + free, head)
        keys, values = (_cache(random, shape, cached) for _ in range(2))
        sequences.append(CachedSequence(keys, values, filled, rows))
    return Case(Rows(query, key, value, *tables, *scales), tuple(sequences))


def _cache(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    if dtype == "int8":
        return random.integers(-128, 128, shape).astype(np.int8)
    return random.standard_normal(shape).astype(dtype)


@st.composite
def cases(draw: st.DrawFn, most_sequences: int = 4, most_rows: int = 40) -> Case:
    """Draw a pass; some of its sequences decode, some have more rows."""
    place = st.tuples(
        st.one_of(st.integers(0, 300), st.sampled_from([0, 127, 1023, 1024, 2100])),
        st.one_of(st.just(1), st.integers(1, most_rows)),
        st.integers(0, 20),
    )
    return case(
        draw(st.lists(place, min_size=1, max_size=most_sequences)),
        heads=draw(st.sampled_from(HEADS)),
        head=draw(st.sampled_from(SIZES)),
        dtypes=draw(st.sampled_from(DTYPES)),
        rotates=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def check(got: NDArray[np.floating], after: Case, before: Case) -> None:
    """Check what a pass gave, what it wrote, and that it wrote nothing else."""
    rows, first = after.rows, 0
    wanted = reference.attend(rows, after.sequences)
    largest = np.abs(wanted).max()
    assert np.abs(got - wanted).max() <= ERRORS[str(got.dtype)] * largest
    keys = reference.rotated(rows.key, rows.cos, rows.sin)
    for one, old in zip(after.sequences, before.sequences, strict=True):
        new = slice(one.cached, one.cached + one.rows)
        given = slice(first, first + one.rows)
        check_written(one.keys[:, new], keys[given], rows.key_scales)
        check_written(one.values[:, new], rows.value[given].astype(np.float64), rows.value_scales)
        for array, former in ((one.keys, old.keys), (one.values, old.values)):
            np.testing.assert_array_equal(
                np.delete(array, range(new.start, new.stop), 1),
                np.delete(former, range(new.start, new.stop), 1),
            )
        first += one.rows


def check_written(
    cached: NDArray[np.generic],
    given: NDArray[np.float64],
    scales: NDArray[np.float32] | None,
) -> None:
    """Check cached `(kv_heads, rows, head)` against heads `(rows, kv_heads, head)`."""
    heads = given.transpose(1, 0, 2)
    got = cached.astype(np.float64)
    if scales is not None:
        steps = np.clip(heads / scales.astype(np.float64)[:, np.newaxis], -128, 127)
        assert np.abs(got - steps).max() <= 0.5 + 1e-4
        return
    size = {"float32": 1e-6, "float16": 2e-3}[str(cached.dtype)]
    assert np.abs(got - heads).max() <= size * max(1, np.abs(heads).max())
