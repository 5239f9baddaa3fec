"""Attention of many sequences in one pass by our own kernel, where it can be had and is right.

Where it cannot, the graph is run as the bundle stores it, with one sequence a pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.kernels.attention import reference
from internvl_edge.kernels.attention.library import CachedSequence, Rows
from internvl_edge.runtime.backends import int8_cache
from internvl_edge.runtime.backends.attention_nodes import SEQUENCES, give_attention
from internvl_edge.runtime.backends.own_kernel import KernelKind, OwnKernel

#: Positions cached, new rows, and the capacity of each sequence that is tried.
_TRIED = ((5, 1, 9), (0, 3, 3), (40, 7, 47))
_ERROR = 1e-4


def addresses(arrays: list[NDArray[Any]]) -> list[int]:
    """Return where arrays begin."""
    return [array.ctypes.data for array in arrays]


def _is_right(kernel: OwnKernel) -> bool:
    """Whether attention as `export` writes it gives NumPy's, run by ONNX Runtime."""
    rows, sequences = _tried()
    got = _run_probe(kernel, rows, sequences)
    wanted = reference.attend(rows, sequences)
    return bool(np.abs(got.reshape(wanted.shape) - wanted).max() <= _ERROR * np.abs(wanted).max())


def _tried() -> tuple[Rows, list[CachedSequence]]:
    """Return rows of integers, which an int8 cache with scales of one holds as they are."""
    spec, count = int8_cache.SPEC, sum(rows for _, rows, _ in _TRIED)
    heads, kv_heads, head = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    query, key, value = (_integers(count, n, head) for n in (heads, kv_heads, kv_heads))
    angles = np.arange(count * (head // 2), dtype=np.float32).reshape(count, -1) * 0
    sequences = [
        CachedSequence(
            _integers(kv_heads, capacity, head).astype(np.int8),
            _integers(kv_heads, capacity, head, 7).astype(np.int8),
            cached,
            rows,
        )
        for cached, rows, capacity in _TRIED
    ]
    tables = np.cos(angles), np.sin(angles)
    return Rows(query / 8, key, value, *tables), sequences


def _integers(rows: int, heads: int, head: int, step: int = 5) -> NDArray[np.float32]:
    """Return whole numbers from -3 to 3."""
    index = np.arange(rows * heads * head) * step
    return ((index * index + index // 7) % 7 - 3).astype(np.float32).reshape(rows, heads, head)


def _run_probe(
    kernel: OwnKernel, rows: Rows, sequences: list[CachedSequence]
) -> NDArray[np.floating]:
    flat = [part.reshape(len(part), -1) for part in (rows.query, rows.key, rows.value)]
    places, first = [], 0
    for one in sequences:
        place = [first, one.rows, one.cached, one.keys.shape[1]]
        places.append([*place, *addresses([one.keys, one.values])])
        first += one.rows
    feeds = {
        int8_cache.QKV: np.concatenate(flat, axis=1),
        contract.ROPE_COS: rows.cos,
        contract.ROPE_SIN: rows.sin,
        SEQUENCES: np.array(places, np.int64),
    }
    (attended,) = kernel.open_probe(int8_cache.PROBE).run([int8_cache.ATTENDED], feeds)
    return np.asarray(attended)


ATTENTION = KernelKind(
    room="attention",
    instead="onnxruntime's GroupQueryAttention",
    give=give_attention,
    is_right=_is_right,
    probes=(int8_cache.PROBE,),
    verdict="rightly",
    on_any_cpu=True,
)
NO_ATTENTION = OwnKernel(ATTENTION, None, "not used")
