"""What is kept of an image is kept under all that it depends on: each input alone makes another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_edge.bundle.extras import example_room
from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import ImageError, InternVL
from internvl_edge.runtime.backends import onnxruntime as onnxruntime_backend
from internvl_edge.runtime.images.identity import ImageIdentity
from internvl_edge.runtime.images.preprocess import Tiling

QUESTION = "<image>\nWhat is written here, line by line?"
TILING = Tiling(tile_size=56, min_tiles=1, max_tiles=6, thumbnail=True)
IDENTITY = ImageIdentity(b"p" * 32, TILING, 7, "model")


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def model(golden_bundle: Path) -> InternVL:
    return InternVL.load(golden_bundle, device="cpu", threads=1)


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, pixels=b"p" * 31 + b"q"),
        replace(IDENTITY, tiling=replace(TILING, tile_size=28)),
        replace(IDENTITY, tiling=replace(TILING, min_tiles=2)),
        replace(IDENTITY, tiling=replace(TILING, max_tiles=7)),
        replace(IDENTITY, tiling=replace(TILING, thumbnail=False)),
        replace(IDENTITY, tiling=replace(TILING, resize="torchvision")),
        replace(IDENTITY, tiling=None),
        replace(IDENTITY, tiles=6),
        replace(IDENTITY, model="other"),
    ],
    ids=["pixels", "size", "min", "max", "thumbnail", "resize", "cut already", "tiles", "model"],
)
def test_every_input_alone_makes_another_image(other: ImageIdentity) -> None:
    assert other.digest != IDENTITY.digest
    assert not set(other.signatures(64)) & set(IDENTITY.signatures(64))


def test_every_row_has_a_number_of_its_own() -> None:
    """The same wherever the image stands, negative, and the first ones however many there are."""
    rows = IDENTITY.signatures(3328)
    assert len(set(rows)) == 3328
    assert (rows < 0).all()
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(replace(IDENTITY).signatures(100), rows[:100])


@pytest.mark.parametrize("limits", [(6, 1), (1, 6), (2, 6), (6, 2)], ids=str)
def test_another_tiling_is_another_image(
    model: InternVL, golden_model: InternVL, limits: tuple[int, int]
) -> None:
    model.generate(QUESTION, [picture(0)], max_tiles=limits[0], max_new_tokens=6)
    second = model.generate(QUESTION, [picture(0)], max_tiles=limits[1], max_new_tokens=6)
    alone = golden_model.generate(QUESTION, [picture(0)], max_tiles=limits[1], max_new_tokens=6)
    assert second.token_ids == alone.token_ids
    assert second.timings.tiles == alone.timings.tiles
    start = model.encode_conversation([("", None)], [], None)
    assert second.timings.cached_tokens <= len(start)  # nothing of the image


@pytest.mark.slow(seconds=3)
def test_answers_after_another_tiling_are_those_of_a_fresh_model(tmp_path: Path) -> None:
    """A trained model, whose answers depend on what it sees."""
    bundle = export_bundle(example_room() / "checkpoint", tmp_path / "bundle")
    receipt = str(example_room() / "receipt.png")
    fresh = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
    for first, second in ((None, 1), (1, None), (2, None), (4, None), (12, 1), (6, 2), (6, 4)):
        kept = InternVL.load(bundle, device="cpu", threads=1)
        for name in ("NAME", "ID", "TEL", "ITEM", "SHOP", "TOTAL", "CODE", "DATE"):
            question = f"What is the {name}?"
            kept.generate(question, [receipt], max_tiles=first, max_new_tokens=24)
            got = kept.generate(question, [receipt], max_tiles=second, max_new_tokens=24)
            wanted = fresh.generate(question, [receipt], max_tiles=second, max_new_tokens=24)
            assert got.token_ids == wanted.token_ids, (first, second, name)


def test_a_prefix_that_ends_inside_an_image_is_that_image_so_far(
    model: InternVL, golden_model: InternVL
) -> None:
    """A prefill was cut short there; the image goes on, or another one does."""
    rows = len(model.encode_images([picture(0)]))
    ids = [3, 5, 7, *[model.context_id] * rows, 11, 13]
    cache = model.engine.backend.new_cache(len(ids))
    tiled = [model.tile_with_identity(picture(0), None)]
    sequence = model.answering.sequence(ids, tiled)
    images, cut = sequence.image_rows(0), 3 + rows // 2
    model.engine.run([model.engine.chunk(cache, sequence, images, cut)])
    model.answering.prefixes.keep(cache)
    for seed, shared in ((0, cut), (1, 0)):
        stream = model.stream(ids, [picture(seed)], max_new_tokens=5)
        reply = stream.finish()
        assert reply.timings.cached_tokens == shared
        alone = golden_model.generate(ids, [picture(seed)], max_new_tokens=5)
        assert reply.token_ids == alone.token_ids


def test_tiles_that_were_cut_before_are_not_the_picture(model: InternVL) -> None:
    tiles = model.tile(picture(0))
    cut = model.inputs.tiles(tiles).identity
    assert cut.digest != model.tile_with_identity(picture(0), None).identity.digest
    assert cut.digest != model.inputs.tiles(tiles[::-1]).identity.digest
    assert cut.digest == model.inputs.tiles(tiles.copy()).identity.digest


@pytest.mark.parametrize(
    "tiles",
    [np.zeros((1, 56, 56, 3)), np.zeros((56, 56, 3), np.uint8), np.zeros((1, 28, 28, 3), np.uint8)],
    ids=["floats", "one axis short", "another size"],
)
def test_tiles_of_another_kind_are_refused(model: InternVL, tiles: NDArray[np.generic]) -> None:
    with pytest.raises(ImageError, match=r"tiles are uint8 of shape \(tiles, 56, 56, 3\).* not "):
        model.logits_of_tiles([3], tiles)


def test_what_encodes_is_part_of_the_identity(
    golden_bundle: Path, model: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity() -> bytes:
        other = InternVL.load(golden_bundle, device="cpu", threads=1)
        return other.tile_with_identity(picture(0), None).identity.digest

    before = identity()
    assert before == model.tile_with_identity(picture(0), None).identity.digest
    monkeypatch.setattr(onnxruntime_backend, "machine_key", lambda: "another CPU")
    assert identity() != before
