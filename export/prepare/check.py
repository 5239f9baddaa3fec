"""Opening what `prepare` wrote, and comparing what it computes, before it is called done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import BundleError, PrepareError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.sessions import Provider, open_session

if TYPE_CHECKING:
    import onnxruntime as ort

#: Tokens of the pass that is compared; of tiles it is one.
TOKENS = 3
#: What the outputs are taken from: whatever else a graph gives is its cache.
_OUTPUT = {
    contract.VISION_GRAPH: contract.IMAGE_EMBEDDINGS,
    contract.LANGUAGE_GRAPH: contract.LOGITS,
}

Feeds = Mapping[str, NDArray[Any]]


def some_pass(manifest: Manifest, graph: str) -> Feeds:
    """Draw the inputs of one pass: a tile, or the first `TOKENS` tokens, all with logits."""
    spec, random = manifest.spec, np.random.default_rng(0)
    if graph == contract.VISION_GRAPH:
        (tiles,) = contract.vision_inputs(spec.vision)
        return {tiles.name: random.integers(0, 256, (1, *map(int, tiles.shape[1:])), np.uint8)}
    inputs = contract.language_inputs(
        spec.language, manifest.language, manifest.kv, manifest.dialect
    )
    place: dict[str, NDArray[Any]] = {
        contract.LAST_POSITION: np.array([TOKENS - 1], np.int32),
        contract.TOTAL_LENGTH: np.array(TOKENS, np.int32),
        contract.LOGIT_ROWS: np.arange(TOKENS),
    }
    shapes = {t: [dim if isinstance(dim, int) else TOKENS for dim in t.shape] for t in inputs}
    drawn: dict[str, NDArray[Any]] = {
        t.name: random.standard_normal(shape).astype(t.dtype, copy=False)
        for t, shape in shapes.items()
    }
    return drawn | place


def computed(session: ort.InferenceSession, graph: str, feeds: Feeds) -> NDArray[Any]:
    """Run one pass; returns the image rows or the logits."""
    return np.asarray(session.run([_OUTPUT[graph]], dict(feeds))[0])


def check_prepared(folder: Path, graph: str, feeds: Feeds, wanted: NDArray[Any]) -> None:
    """Open a graph in `folder`, and compare a pass with the plain graph's.

    Raises:
        PrepareError: it does not load, or differs in a bit.
    """
    try:
        session = open_session(folder, graph, Provider(optimise="none"), None)
    except BundleError as error:
        raise _unusable(f"does not load what it packed: {error}") from error
    if computed(session, graph, feeds).tobytes() != wanted.tobytes():
        raise _unusable(f"computes {graph} differently from what it packed")


def _unusable(what: str) -> PrepareError:
    return PrepareError(
        f"onnxruntime {load_onnxruntime().__version__} {what}; nothing was kept: the bundle runs"
        " as it is, only it takes more memory"
    )
