"""Every family in both layouts, of random shape, beside what transformers' own classes compute."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import reference_logits, reference_pixels, reference_rows
from transformers import InternVLForConditionalGeneration
from whole_models import KINDS, SHAPES, drawn_model, model_config, rewrite_original, save_native

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.runtime import InternVL, TokenStream
from internvl_edge.runtime.decoding.request import Request

EMBEDDING_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 2e-4
GREEDY = 32
#: Logits closer than this may change places within the tolerance.
TIE = 2 * LOGIT_TOLERANCE
LAYOUTS = ("internvl", "internvl_chat")


def prompt(model: InternVL, turns: list[list[int]]) -> list[int]:
    """Ids of a conversation in which each image has so many tiles."""
    rows = model.spec.vision.tokens_per_tile
    text = ""
    for number, images in enumerate(turns):
        slots = "".join(f"<img>{'<IMG_CONTEXT>' * (rows * tiles)}</img>\n" for tiles in images)
        text += "<|im_end|>\n" if number else ""
        text += f"<|im_start|>user\n{slots}How many boats are there?<|im_end|>\n"
        text += "<|im_start|>assistant\n" + ("Two." if number + 1 < len(turns) else "")
    return model.tokenizer.encode(text)


def expected_greedy(
    reference: InternVLForConditionalGeneration, ids: list[int], tiles: NDArray[np.uint8]
) -> list[int]:
    """transformers' own answer, up to where two tokens are as likely as each other."""
    config = reference.generation_config
    config.eos_token_id, config.pad_token_id = None, 0
    images = {"pixel_values": reference_pixels(tiles)} if len(tiles) else {}
    with torch.no_grad():
        done = reference.generate(
            input_ids=torch.tensor([ids]),
            **images,
            max_new_tokens=GREEDY,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = done.sequences[0, len(ids) :].tolist()
    best = [torch.topk(logits[0], 2).values for logits in done.logits]
    ties = [step for step, (one, other) in enumerate(best) if one - other < TIE]
    return answer[: min(ties, default=GREEDY)]


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_models_of_any_shape(kind: str, layout: str, shape: dict[str, Any], seed: int) -> None:
    """No image, one, several; one turn and two; within the trained length and beyond."""
    reference = drawn_model(model_config(kind, shape), seed)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = save_native(reference, Path(name) / "model", shape["tile"])
        if layout == "internvl_chat":
            checkpoint = rewrite_original(checkpoint, Path(name) / "original", kind)
        assert Checkpoint(checkpoint).spec.language.tied_head == shape["tied"]
        bundle = export_bundle(checkpoint, Path(name) / "bundle")
        model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
        compare(model, reference, shape, seed)


def compare(
    model: InternVL, reference: InternVLForConditionalGeneration, shape: dict[str, Any], seed: int
) -> None:
    """Embeddings, logits and the greedy answer."""
    random, side = np.random.default_rng(seed), shape["tile"]
    images = [
        random.integers(0, 256, (count, side, side, 3), np.uint8)
        for turn in shape["turns"]
        for count in turn
    ]
    tiles = np.concatenate([np.empty((0, side, side, 3), np.uint8), *images])
    ids = prompt(model, shape["turns"])
    if len(tiles):
        expected = reference_logits(reference, ids, tiles)
        rows = model.engine.backend.encode_tiles(tiles)
        wanted = reference_rows(reference, tiles).reshape(rows.shape)
        np.testing.assert_allclose(rows, wanted, rtol=0, atol=EMBEDDING_TOLERANCE)
    else:
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids])).logits[0].numpy()
    got = model.logits_of_tiles(ids, tiles)
    np.testing.assert_allclose(got, expected, rtol=0, atol=LOGIT_TOLERANCE)
    greedy = expected_greedy(reference, ids, tiles)
    request = Request(ids, (), [model.inputs.tiles(one) for one in images], max_new_tokens=GREEDY)
    answer = TokenStream(model.answering, request).finish()
    assert answer.token_ids[: len(greedy)] == greedy
    assert len(answer.token_ids) == GREEDY
