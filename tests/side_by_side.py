"""Sequences that share passes on CUDA: models, caches with something in them, and what is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import Slice
from internvl_edge.runtime.backends.cuda_passes import CudaCache, Layout
from internvl_edge.runtime.decoding.passes import Run

SEQUENCES, CONTEXT = 3, 700


def load(path: Path, **options: Any) -> InternVL:
    """Keeps nothing between prompts, so that each computes everything."""
    given = {"max_sequences": SEQUENCES, "max_context": CONTEXT, "reuse_bytes": 0}
    return InternVL.load(path, device="cuda", threads=2, **{**given, **options})


def caches(model: InternVL, lengths: list[int]) -> list[Any]:
    """Caches with so many positions filled, on CUDA in neighbouring slots."""
    made = [model.engine.backend.new_cache(CONTEXT) for _ in lengths]
    for number, (cache, length) in enumerate(zip(made, lengths, strict=True)):
        if ids := [5 + (number + place) % 400 for place in range(length)]:
            model.engine.run([new_run(model, cache, ids)])
    return made


def new_run(model: InternVL, cache: Any, ids: list[int], count: int = 0) -> Run:
    array = np.array(ids, np.int64)
    base = model.spec.language.rope_theta
    return Run(cache, array, array, base, np.array([len(ids) - 1]), count)


def held(cache: CudaCache) -> NDArray[Any]:
    """Keys and values `(2 * layers, kv_heads, context, head_dim)`."""
    return cache.slot.storage.memory.to_host()[:, cache.slot.index]


def noted_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note of how many sequences each pass is, from now on."""
    found: list[int] = []
    of = Layout.of

    def counted(parts: Sequence[Slice]) -> Layout:
        layout = of(parts)
        found.append(layout.count)
        return layout

    monkeypatch.setattr(Layout, "of", counted)
    return found
