"""Attention beside ONNX Runtime's GroupQueryAttention, over caches in float32 and in int8.

Both run in turns in sessions of their own, with the same threads and the same caches; medians are
compared. ONNX Runtime takes one sequence a pass: several are run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bench.common.turns import in_turns, session_options
from internvl_edge.bundle import contract
from internvl_edge.bundle.contract import CachePrecision
from internvl_edge.export.graphs.dialects.probes import attention_graph
from internvl_edge.runtime.backends import int8_cache
from internvl_edge.runtime.backends.attention_nodes import SEQUENCES, give_attention
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_kernel import OwnKernel

#: Heads, heads of keys, and their size: InternLM2-20B's.
SHAPE = (48, 8, 128)
#: Sequences, new rows of each, and positions cached: answers, several at once, a draft, and the
#: last chunk of a picture of 13 tiles.
PASSES = ((1, 1, 512), (1, 1, 4096), (8, 1, 512), (1, 4, 2048), (1, 512, 2817))
CACHES: tuple[CachePrecision, ...] = ("fp32", "int8")
#: Largest difference from GroupQueryAttention, as a share of the largest result: where a key rounds
#: to the other byte, more than of float32.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class AttentionRow:
    """One pass; times are medians in milliseconds.

    Attributes:
        cache: precision of the cache.
        sequences, rows, cached: in the pass, of each, and before them.
        theirs_ms, ours_ms: of ONNX Runtime's operator, a sequence at a time, and of our kernel.
        speedup: of ours over it.
        gflops: operations a second of ours, in units of 1e9.
        gigabytes_per_s: of the caches, read once by ours.
        difference: from GroupQueryAttention, at most; see `TOLERANCE`.
    """

    cache: CachePrecision
    sequences: int
    rows: int
    cached: int
    theirs_ms: float
    ours_ms: float
    speedup: float
    gflops: float
    gigabytes_per_s: float
    difference: float


def measure_attention(kernel: OwnKernel, threads: int, runs: int) -> list[AttentionRow]:
    """Time every pass with every cache.

    Args:
        kernel: with a library.
        threads: of each session.
        runs: of each pass; the first, which warms up, is not counted.
    """
    measured = []
    for cache in CACHES:
        if cache == "int8" and not int8_cache.takes_int8_cache():
            continue
        pair = _Pair.open(kernel, threads, cache)
        measured += [pair.measure(*one, runs) for one in PASSES]
    return measured


@dataclass(frozen=True)
class _Pair:
    """Sessions of both operators."""

    cache: CachePrecision
    theirs: Any
    ours: Any

    @classmethod
    def open(cls, kernel: OwnKernel, threads: int, cache: CachePrecision) -> _Pair:
        heads, kv_heads, head = SHAPE
        spec = replace(
            int8_cache.SPEC,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_size=head,
        )
        model = attention_graph(spec, cache).SerializeToString()
        ort = load_onnxruntime()
        sessions = []
        for given in (model, give_attention(model)):
            options = session_options(threads)
            options.register_custom_ops_library(str(kernel.library))
            sessions.append(ort.InferenceSession(given, options, ["CPUExecutionProvider"]))
        return cls(cache, *sessions)

    def measure(self, sequences: int, rows: int, cached: int, runs: int) -> AttentionRow:
        given = _Given.draw(self.cache, sequences, rows, cached)
        timed = in_turns({"theirs": self._theirs(given), "ours": self._ours(given)}, runs)
        theirs_s, ours_s = timed["theirs"].seconds, timed["ours"].seconds
        theirs, ours = (np.concatenate(one.result).reshape(-1) for one in timed.values())
        heads, kv_heads, head = SHAPE
        operations = 4 * heads * head * sequences * rows * (cached + (rows + 1) / 2)
        item = np.dtype(contract.CACHE_DTYPE[self.cache]).itemsize
        read = 2 * kv_heads * head * sequences * (cached + rows) * item
        return AttentionRow(
            self.cache,
            sequences,
            rows,
            cached,
            theirs_ms=round(theirs_s * 1e3, 3),
            ours_ms=round(ours_s * 1e3, 3),
            speedup=round(theirs_s / ours_s, 2),
            gflops=round(operations / ours_s / 1e9, 1),
            gigabytes_per_s=round(read / ours_s / 1e9, 1),
            difference=float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        )

    def _theirs(self, given: _Given) -> Callable[[], Sequence[NDArray[Any]]]:
        bindings = []
        for qkv, pair in zip(np.split(given.qkv, len(given.caches)), given.caches, strict=True):
            binding = self.theirs.io_binding()
            names = (contract.past_key(0), contract.past_value(0))
            presents = (int8_cache.KEY, int8_cache.VALUE)
            for past, present, value in zip(names, presents, pair, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            total = given.cached + given.rows
            feeds = {
                int8_cache.QKV: qkv,
                contract.ROPE_COS: given.cos,
                contract.ROPE_SIN: given.sin,
                contract.LAST_POSITION: np.array([total - 1], np.int32),
                contract.TOTAL_LENGTH: np.array(total, np.int32),
            }
            for name, values in feeds.items():
                binding.bind_cpu_input(name, values)
            binding.bind_output(int8_cache.ATTENDED)
            bindings.append(binding)

        def run() -> Sequence[NDArray[Any]]:
            for binding in bindings:
                self.theirs.run_with_iobinding(binding)
            return [binding.copy_outputs_to_cpu()[-1] for binding in bindings]

        return run

    def _ours(self, given: _Given) -> Callable[[], Sequence[NDArray[Any]]]:
        count, rows = len(given.caches), given.rows
        places = [
            [i * rows, rows, given.cached, given.cached + rows, *(one.data_ptr() for one in pair)]
            for i, pair in enumerate(given.caches)
        ]
        feeds = {
            int8_cache.QKV: given.qkv,
            contract.ROPE_COS: np.tile(given.cos[given.cached :], (count, 1)),
            contract.ROPE_SIN: np.tile(given.sin[given.cached :], (count, 1)),
            SEQUENCES: np.array(places, np.int64),
        }
        return lambda: self.ours.run([int8_cache.ATTENDED], feeds)


@dataclass(frozen=True)
class _Given:
    """What a pass is over.

    Attributes:
        qkv: `(rows of all, width)`.
        cos, sin: `(positions, head / 2)`.
        caches: keys and values of each sequence, as values of ONNX Runtime.
    """

    rows: int
    cached: int
    qkv: NDArray[np.float32]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    caches: Sequence[tuple[Any, Any]]

    @classmethod
    def draw(cls, cache: CachePrecision, sequences: int, rows: int, cached: int) -> _Given:
        random = np.random.default_rng(rows)
        heads, kv_heads, head = SHAPE
        width, total = (heads + 2 * kv_heads) * head, cached + rows
        qkv = random.standard_normal((sequences * rows, width)).astype(np.float32)
        angles = random.uniform(-3, 3, (total, head // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        value = load_onnxruntime().OrtValue.ortvalue_from_numpy
        shape, spread = (1, kv_heads, total, head), 30 if cache == "int8" else 1
        dtype = contract.CACHE_DTYPE[cache]

        def drawn() -> Any:
            return value((random.standard_normal(shape) * spread).astype(dtype))

        return cls(rows, cached, qkv, cos, sin, [(drawn(), drawn()) for _ in range(sequences)])


def render_attention(kernel: OwnKernel, rows: Sequence[AttentionRow], threads: int) -> list[str]:
    """Return the lines of a report."""
    heads, kv_heads, head = SHAPE
    title = f"attention, {heads} heads over {kv_heads} of {head}, {threads} threads: {kernel}"
    return [
        "",
        title,
        *(
            f"  {row.cache:4} {row.sequences} x {row.rows:3} rows behind {row.cached:4} "
            f" GroupQueryAttention {row.theirs_ms:9.3f} ms, ours {row.ours_ms:9.3f} ms ="
            f" {row.speedup:5.2f}x faster, {row.gflops:6.1f} GFLOP/s,"
            f" {row.gigabytes_per_s:5.1f} GB/s"
            for row in rows
        ),
    ]
