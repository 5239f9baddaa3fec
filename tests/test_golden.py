"""The golden fixture: what the reference implementation computed, reproduced through the runtime.

Tolerances are absolute. The reference in float64 differs from its own float32 run by 4.8e-5 in the
logits, so 2e-4 leaves room for another summation order and for nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.export.bundle import export_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.sequence import TokenSequence
from internvl_edge.runtime.images.preprocess import select_grid

EMBEDDING_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 2e-4

Arrays = dict[str, NDArray[Any]]
Images = dict[str, Image.Image]
Chats = dict[str, dict[str, Any]]

TILED = json.loads((GOLDEN / "tiles.json").read_text())["images"]
TURNS = ("turn1", "turn2")


@pytest.mark.parametrize("case", TILED, ids=lambda case: Path(case["file"]).stem)
def test_tiles_are_bit_equal(
    golden_model: InternVL, golden_images: Images, tile_arrays: Arrays, case: dict[str, Any]
) -> None:
    stem = Path(case["file"]).stem
    tiles = golden_model.tile(golden_images[stem], max_tiles=case["max_num"])
    assert len(tiles) == case["n_tiles"]
    np.testing.assert_array_equal(tiles, tile_arrays[f"{stem}_tiles_u8"])


def test_pass_order_trap_is_a_trap(tile_arrays: Arrays) -> None:
    """The image stored both ways does differ, so the test above can fail."""
    assert (tile_arrays["img5_order_tiles_u8"] != tile_arrays["img5_order_tiles_u8_pillow13"]).any()


def test_grids_are_equal() -> None:
    cases = json.loads((GOLDEN / "tile_grids.json").read_text())
    for case in cases:
        got = select_grid(
            case["width"],
            case["height"],
            min_tiles=case["min_num"],
            max_tiles=case["max_num"],
            tile_size=case["image_size"],
        )
        assert got == (case["cols"], case["rows"]), case
    assert len(cases) > 100


@pytest.mark.parametrize("image", ["img0", "img1", "img2"])
def test_image_embeddings(
    golden_model: InternVL, golden_images: Images, vision_arrays: Arrays, image: str
) -> None:
    key = "img0_projected_v1" if image == "img0" else f"{image}_projected"
    limit = 6 if image != "img2" else 12
    got = golden_model.encode_images([golden_images[image]], max_tiles=limit)
    expected = vision_arrays[key].reshape(got.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=EMBEDDING_TOLERANCE)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"ps_version": "v2"}, "img0_projected_v2"),
        ({"select_layer": -2}, "img0_projected_select-2"),
    ],
)
def test_image_embeddings_of_variants(
    tmp_path: Path,
    golden_images: Images,
    vision_arrays: Arrays,
    change: dict[str, Any],
    key: str,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in (GOLDEN / "model").iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = InternVL.load(export_bundle(checkpoint, tmp_path / "bundle"), device="cpu", threads=2)
    got = model.encode_images([golden_images["img0"]], max_tiles=6)
    expected = vision_arrays[key].reshape(got.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=EMBEDDING_TOLERANCE)


def test_logits_with_image(
    golden_model: InternVL, golden_images: Images, logits_arrays: Arrays
) -> None:
    got = golden_model.logits(logits_arrays["single_input_ids"][0], [golden_images["img0"]], 6)
    np.testing.assert_allclose(got, logits_arrays["single_logits"][0], rtol=0, atol=LOGIT_TOLERANCE)


def test_logits_of_text(golden_model: InternVL, logits_arrays: Arrays) -> None:
    got = golden_model.logits(logits_arrays["text_input_ids"][0])
    np.testing.assert_allclose(got, logits_arrays["text_logits"][0], rtol=0, atol=LOGIT_TOLERANCE)


def test_logits_beyond_the_trained_length(golden_model: InternVL, logits_arrays: Arrays) -> None:
    """768 tokens against max_position_embeddings 512: dynamic NTK, over several chunks."""
    ids = logits_arrays["ntk_input_ids"][0]
    assert len(ids) > golden_model.spec.language.max_position_embeddings
    got = golden_model.logits(ids)
    for part, key in ((got[-8:], "ntk_logits_last8"), (got[:4], "ntk_logits_first4")):
        np.testing.assert_allclose(part, logits_arrays[key][0], rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("case", ["text", "ntk"])
def test_logits_over_a_half_precision_cache(
    tmp_path: Path, golden_model: InternVL, logits_arrays: Arrays, case: str
) -> None:
    """Attention alone rounds to float16, 2**-11 of a value: the logits' error is a few of those."""
    bundle = export_bundle(GOLDEN / "model", tmp_path / "bundle", kv="fp16")
    model = InternVL.load(bundle, device="cpu", threads=1)
    ids = logits_arrays[f"{case}_input_ids"][0]
    wanted = logits_arrays["text_logits" if case == "text" else "ntk_logits_last8"][0]
    error = model.logits(ids)[-len(wanted) :] - wanted
    assert 1e-4 < np.sqrt((error**2).mean() / (wanted**2).mean()) < 6 * 2**-11
    half, full = cached_bytes(model, ids), cached_bytes(golden_model, ids)
    assert 0 < 2 * half == full


def cached_bytes(model: InternVL, ids: NDArray[Any]) -> int:
    """Of a conversation's cache once the prompt is in it."""
    cache = model.engine.backend.new_cache(len(ids))
    sequence = TokenSequence.build(ids.tolist(), model.context_id, [])
    model.engine.prefill(cache, sequence)
    return cache.nbytes


@pytest.mark.parametrize("name", ["single", "multi_image", "video", "text_only"])
def test_greedy_answers(
    golden_model: InternVL,
    golden_images: Images,
    golden_chats: Chats,
    chat_arrays: Arrays,
    tile_arrays: Arrays,
    name: str,
) -> None:
    images: dict[str, list[Any]] = {
        "single": [golden_images["img0"]],
        "multi_image": [golden_images["img0"], golden_images["img1"]],
        "video": [tile_arrays[f"img{i}_tiles_u8"][0] for i in (2, 1, 0)],
        "text_only": [],
    }
    expected = chat_arrays[f"{name}_generated"][0].tolist()
    prompt = golden_chats[name]["question"]
    tiled = [golden_model.tile_with_identity(image, 6) for image in images[name]]
    question = prompt if "<image>" in prompt or not tiled else f"<image>\n{prompt}"
    ids = golden_model.encode_conversation([(question, None)], tiled, None)
    assert ids == chat_arrays[f"{name}_input_ids"][0].tolist()
    reply = golden_model.generate(
        prompt, images[name], max_tiles=6, max_new_tokens=len(expected), extra_stops=False
    )
    assert reply.token_ids == expected
    assert reply.text == golden_chats[name]["response"]
    assert reply.timings.prompt_tokens == len(ids)


def test_two_turns(
    golden_model: InternVL, golden_images: Images, golden_chats: Chats, chat_arrays: Arrays
) -> None:
    chat = golden_model.chat(max_tiles=6)
    for turn, name in enumerate(TURNS):
        expected = chat_arrays[f"{name}_generated"][0].tolist()
        reply = chat.send(
            golden_chats[name]["question"],
            [golden_images["img0"]] if turn == 0 else [],
            max_new_tokens=len(expected),
            extra_stops=False,
        )
        assert reply.token_ids == expected
        assert reply.text == golden_chats[name]["response"]
        assert reply.timings.prompt_tokens == chat_arrays[f"{name}_input_ids"].shape[1]


def test_stop_id_ends_the_answer(golden_model: InternVL, chat_arrays: Arrays) -> None:
    reply = golden_model.generate(
        chat_arrays["early_stop_input_ids"][0].tolist(), extra_stops=False
    )
    assert reply.token_ids == chat_arrays["early_stop_generated"][0].tolist()
    assert reply.finish_reason == "stop"


def test_decoding_across_the_trained_length(golden_model: InternVL, logits_arrays: Arrays) -> None:
    """Each step beyond it takes its own rotary base; cached keys keep theirs."""
    reply = golden_model.generate(
        logits_arrays["ntk_cross_input_ids"][0].tolist(), max_new_tokens=16, extra_stops=False
    )
    assert reply.token_ids == logits_arrays["ntk_cross_generated"][0].tolist()
