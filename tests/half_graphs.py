"""Graphs in float16 by ONNX's own NumPy kernels, which round after every node.

ONNX Runtime's CPU has no float16 product: it computes in float32 and drops pairs of casts, so that
values which overflow elsewhere do not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from internvl_edge.bundle import contract
from internvl_edge.bundle.manifest import open_bundle
from internvl_edge.bundle.rope import rope_base, rope_rows

Floats = NDArray[np.float32]


def embeddings_of_a_tile(bundle: Path) -> Floats:
    """Image embeddings of one tile of noise."""
    tiles = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3)).astype(np.uint8)
    feeds = {contract.TILES: tiles}
    return _evaluated(bundle / contract.VISION_GRAPH, contract.IMAGE_EMBEDDINGS, feeds)


def logits_of_rows(bundle: Path, rows: Floats, context: int = 16) -> Floats:
    """Logits of a prefill of embeddings `(tokens, hidden)`, the cache having room for `context`."""
    opened = open_bundle(bundle, verify="size")
    manifest, language, tokens = opened.manifest, opened.spec.language, len(rows)
    cos, sin = rope_rows(language, rope_base(language, tokens), 0, context)
    feeds: dict[str, Any] = {
        contract.EMBEDDINGS: rows,
        contract.ROPE_COS: cos[np.newaxis],
        contract.ROPE_SIN: sin[np.newaxis],
        contract.POSITIONS: np.arange(tokens)[np.newaxis],
        contract.KEY_POSITIONS: np.arange(context),
        contract.LOGIT_ROWS: np.arange(tokens),
    }
    inputs = contract.language_inputs(language, manifest.language, manifest.kv, manifest.dialect)
    empty = np.zeros(contract.cache_shape(language, context))
    feeds = {t.name: feeds.get(t.name, empty).astype(t.dtype) for t in inputs}
    return _evaluated(bundle / contract.LANGUAGE_GRAPH, contract.LOGITS, feeds)


def _evaluated(graph: Path, output: str, feeds: dict[str, Any]) -> Floats:
    with np.errstate(all="ignore"):
        found: Floats = ReferenceEvaluator(onnx.load(graph)).run([output], feeds)[0]
    return found
