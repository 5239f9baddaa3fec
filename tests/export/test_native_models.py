"""Whole models of random shape, written by transformers itself, beside what its classes compute."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import reference_logits, reference_rows
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.runtime import InternVL

#: Its tokenizer and template are every model's here.
FILES = Path(__file__).parents[1] / "families" / "hf_qwen2" / "model"
VOCAB = 397
EMBEDDING_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 2e-4

SHAPES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["llama", "qwen2", "qwen3"]),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 5),
        "head_dim": st.sampled_from([8, 16, 24, 32]),
        "mlp": st.integers(1, 12).map(lambda n: 8 * n),
        "layers": st.integers(1, 3),
        "tied": st.booleans(),
        "bias": st.booleans(),
        "rope": st.sampled_from(
            [
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": 2.0},
                {"rope_type": "dynamic", "factor": 3.0},
            ]
        ),
        "vision_heads": st.integers(1, 3),
        "vision_norm": st.sampled_from(["layer_norm", "rms_norm"]),
        "vision_qk_norm": st.booleans(),
        "vision_bias": st.booleans(),
        "tile": st.sampled_from([28, 56]),
        "tiles": st.integers(0, 3),
    }
)


def native_config(shape: dict[str, Any]) -> InternVLConfig:
    heads = shape["kv_heads"] * shape["group"]
    stretched = shape["rope"]["rope_type"] == "dynamic"
    free = shape["kind"] == "qwen3"  # the width need not be that of all heads
    text = AutoConfig.for_model(
        shape["kind"],
        hidden_size=48 if free else heads * shape["head_dim"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=heads,
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=24 if stretched else 512,
        rms_norm_eps=1e-5,
        rope_parameters={**shape["rope"], "rope_theta": 10000.0},
        tie_word_embeddings=shape["tied"],
        vocab_size=VOCAB,
        **({"head_dim": shape["head_dim"]} if free else {}),
        **({} if shape["kind"] == "qwen2" else {"attention_bias": shape["bias"]}),
    )
    vision = {
        "hidden_size": 16 * shape["vision_heads"],
        "num_attention_heads": shape["vision_heads"],
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "image_size": [shape["tile"], shape["tile"]],
        "norm_type": shape["vision_norm"],
        "use_qk_norm": shape["vision_qk_norm"],
        "attention_bias": shape["vision_bias"],
    }
    rows = (shape["tile"] // 14 // 2) ** 2
    return InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=390,
        image_seq_length=rows,
        tie_word_embeddings=shape["tied"],
    )


def native_model(config: InternVLConfig, seed: int) -> InternVLForConditionalGeneration:
    """Weights that keep activations near one, whatever the class's initialisation."""
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if value.ndim > 1 and "embed" not in name and "token" not in name:
                value.copy_(drawn * value[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.2 * drawn)
            else:
                value.copy_(drawn if value.ndim > 1 else 0.3 * drawn)
    return model


def save(model: InternVLForConditionalGeneration, folder: Path, tile: int) -> Path:
    """As transformers writes it, with a tokenizer's and a processor's files."""
    disable_progress_bar()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(FILES / name, folder / name)
    processor = json.loads((FILES / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": tile, "width": tile}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 368}))
    return folder


def prompt(model: InternVL, tiles: NDArray[np.uint8]) -> list[int]:
    rows = len(tiles) * model.spec.vision.tokens_per_tile
    slots = f"<img>{'<IMG_CONTEXT>' * rows}</img>\n" if rows else ""
    text = f"<|im_start|>user\n{slots}How many boats are there?<|im_end|>\n<|im_start|>assistant\n"
    return model.answering.tokenizer.encode(text)


@pytest.mark.slow(seconds=20)
@settings(max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_models_of_any_shape(shape: dict[str, Any], seed: int) -> None:
    reference = native_model(native_config(shape), seed)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = save(reference, Path(name) / "model", shape["tile"])
        assert Checkpoint(checkpoint).spec.language.tied_head == shape["tied"]
        bundle = export_bundle(checkpoint, Path(name) / "bundle")
        model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
        size = (shape["tiles"], shape["tile"], shape["tile"], 3)
        tiles = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        ids = prompt(model, tiles)
        if not len(tiles):
            with torch.no_grad():
                expected = reference(input_ids=torch.tensor([ids])).logits[0].numpy()
        else:
            expected = reference_logits(reference, ids, tiles)
            rows = model.engine.backend.encode_tiles(tiles)
            wanted = reference_rows(reference, tiles).reshape(rows.shape)
            np.testing.assert_allclose(rows, wanted, rtol=0, atol=EMBEDDING_TOLERANCE)
        got = model.logits_of_tiles(ids, tiles)
        np.testing.assert_allclose(got, expected, rtol=0, atol=LOGIT_TOLERANCE)
