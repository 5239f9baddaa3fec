"""A TensorRT bundle's own files on ONNX Runtime's CPU kernels, beside what they must equal.

Those kernels compute float16 products in float32 and drop casts between them, so a value that
overflows float16 passes here: finding those is the range analysis's part (`ranges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import BundleError
from internvl_edge.bundle.manifest import Bundle, Manifest, open_bundle, read_manifest
from internvl_edge.bundle.quoting import named
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.bundle.rope import rope_base
from internvl_edge.calib_data.generator import generate
from internvl_edge.export.calibration.ranges import sqnr_db
from internvl_edge.runtime.backends import Backend, Slice
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.devices import open_device

#: Tokens behind the image rows, and how many of them are decoded one by one.
TEXT, STEPS = 24, 4
#: Room in the cache beyond the sequence: keys that nobody may see.
UNUSED = 64

#: Least SQNR in dB between a bundle and the onnxruntime dialect of the same weights. float32
#: differs in the order of sums, float16 by its 11 bits (73 dB for one rounding). Beside integers
#: the two compute differently: activations in float16 here; there in float32 (int8 vision), or
#: rounded to int8 by the block (int8 and int4 decoders), which is worth 40 dB at best.
REFERENCE_FLOOR = {"fp32": 80.0, "fp16": 50.0, "int8": 25.0, "int4": 20.0}
#: Least SQNR in dB between tokens decoded one by one and one pass over all: the same weights and
#: types in products of another shape; an int8 cache rounds the same keys in both.
DECODE_FLOOR = {"float32": 80.0, "float16": 50.0}


@dataclass(frozen=True)
class Comparison:
    """Two computations of one result.

    Attributes:
        name: what is compared.
        sqnr_db: of the result, as signal, to the difference, as noise.
        floor_db: at least this is asked for.
    """

    name: str
    sqnr_db: float
    floor_db: float

    @property
    def holds(self) -> bool:
        """Tell whether the results agree; not-a-number never does."""
        return self.sqnr_db >= self.floor_db


@dataclass(frozen=True)
class Outputs:
    """The results of a bundle.

    Attributes:
        rows: image embeddings `(rows, hidden)`.
        whole: logits `(STEPS, vocab)` of the last tokens from one pass over the sequence.
        stepped: the same, each token appended to the cache by itself.
        beside: the same, in passes that another sequence shares; None: passes take one sequence.
    """

    rows: NDArray[np.float32]
    whole: NDArray[np.float32]
    stepped: NDArray[np.float32]
    beside: NDArray[np.float32] | None


def compare_bundles(path: Path, reference: Path | None) -> list[Comparison]:
    """Compare a bundle with itself, and with the onnxruntime dialect of the same weights.

    Raises:
        BundleError: a bundle does not load, or the reference is of another model or precision.
    """
    manifest = read_manifest(path)
    if reference is not None:
        _check_reference(manifest, reference)
    got = run_bundle(path)
    floor = DECODE_FLOOR["float32" if manifest.language == "fp32" else "float16"]
    found = [Comparison("decode against one prefill", _sqnr(got.whole, got.stepped), floor)]
    if got.beside is not None:
        sqnr = _sqnr(got.stepped, got.beside)
        found.append(Comparison("decode beside another", sqnr, floor))
    if reference is not None:
        # The decoder gets the same image rows in both, so that its own differences are seen.
        expected = run_bundle(reference, got.rows)
        vision, language = REFERENCE_FLOOR[manifest.vision], REFERENCE_FLOOR[manifest.language]
        found += [
            Comparison("image embeddings", _sqnr(expected.rows, got.rows), vision),
            Comparison("prefill logits", _sqnr(expected.whole, got.whole), language),
            Comparison("decode logits", _sqnr(expected.whole, got.stepped), language),
        ]
    return found


def run_bundle(path: Path, rows: NDArray[np.float32] | None = None) -> Outputs:
    """Encode one generated picture, then read it and some text.

    Args:
        rows: what the decoder gets as image rows `(rows, hidden)`; None: the bundle's own.
    """
    bundle = open_bundle(path, verify="size")
    backend = open_device(bundle, "cpu", None).backend
    size = bundle.spec.vision.tile_size
    tile = np.asarray(generate(1)[0].image.convert("RGB").resize((size, size)))
    own = backend.encode_tiles(tile[np.newaxis]).reshape(-1, bundle.spec.language.hidden_size)
    words = np.random.default_rng(0).integers(bundle.spec.language.vocab_size, size=TEXT)
    text = EmbeddingTable.load(bundle).rows(words)
    embeddings = np.concatenate([own if rows is None else rows, text]).astype(text.dtype)
    total = len(embeddings)
    ends = list(range(total - STEPS, total + 1))
    return Outputs(
        own.astype(np.float32),
        whole=_decode(bundle, backend, embeddings, [total], STEPS),
        stepped=_decode(bundle, backend, embeddings, ends, 1)[-STEPS:],
        beside=_decode_beside(bundle, backend, embeddings) if backend.most_slices > 1 else None,
    )


def _decode(
    bundle: Bundle,
    backend: Backend,
    embeddings: NDArray[np.floating],
    ends: Sequence[int],
    logit_rows: int,
) -> NDArray[np.float32]:
    """Rows `(tokens, hidden)` through a cache in passes that end at `ends`.

    Returns:
        The logits of the last `logit_rows` rows of every pass.
    """
    cache = backend.new_cache(len(embeddings) + UNUSED)
    theta = rope_base(bundle.spec.language, len(embeddings))
    logits = []
    for start, end in pairwise([0, *ends]):
        wanted = np.arange(end - start)[-logit_rows:]
        logits.append(backend.forward([Slice(cache, embeddings[start:end], theta, wanted)]))
        cache.state.extend(np.arange(start, end), theta)
    return np.concatenate(logits)


def _decode_beside(
    bundle: Bundle, backend: Backend, embeddings: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Read `(tokens, hidden)`, and beside it a sequence that begins with its second half; decode
    the last `STEPS` rows of both in the same passes.

    Returns:
        the logits of these rows of the first `(STEPS, vocab)`.
    """
    sequences = [embeddings, embeddings[len(embeddings) // 2 :]]
    thetas = [rope_base(bundle.spec.language, len(rows)) for rows in sequences]
    caches = [backend.new_cache(len(rows) + UNUSED) for rows in sequences]

    def run(batch: Sequence[Slice]) -> NDArray[np.float32]:
        logits = backend.forward(batch)
        for new in batch:
            new.cache.state.extend(np.arange(len(new.rows)), new.rope_theta)
        return logits

    last = np.zeros(1, np.int64)
    for rows, theta, cache in zip(sequences, thetas, caches, strict=True):
        run([Slice(cache, rows[:-STEPS], theta, last)])
    steps = [
        [
            Slice(cache, rows[len(rows) - STEPS + step :][:1], theta, last)
            for rows, theta, cache in zip(sequences, thetas, caches, strict=True)
        ]
        for step in range(STEPS)
    ]
    return np.concatenate([run(batch)[:1] for batch in steps])


def _check_reference(manifest: Manifest, reference: Path) -> None:
    other = read_manifest(reference)
    if other.traits.engines:
        raise BundleError(
            f"{named(reference)} is of the {other.dialect} dialect", [Remedy.FOR_ONNXRUNTIME]
        )
    if (other.spec, other.vision, other.language) != (
        manifest.spec,
        manifest.vision,
        manifest.language,
    ):
        raise BundleError(
            f"{named(reference)} is another model, or another precision ({other.vision},"
            f" {other.language} against {manifest.vision}, {manifest.language}); export both"
            " from one checkpoint"
        )


def _sqnr(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    wide = expected.astype(np.float64)
    return sqnr_db(float((wide**2).sum()), float(((got - wide) ** 2).sum()))
