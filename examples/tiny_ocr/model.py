"""Shape of the tiny model and the conversation format it is trained and asked in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration

from internvl_edge.examples.tiny_ocr.data import MAX_TILES, SIDE
from internvl_edge.examples.tiny_ocr.tokenizer import APPENDED, PIECES, Tokenizer
from internvl_edge.runtime.images.preprocess import tile_image

SYSTEM = "You read receipts."
TILE_TOKENS = (SIDE // 14 // 2) ** 2  # 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def v15_config() -> dict[str, Any]:
    """The checkpoint's config.json."""
    vocab = PIECES + len(APPENDED)
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 256,
            "initializer_range": 0.02,
            "intermediate_size": 512,
            "max_position_embeddings": 2048,
            "model_type": "internlm2",
            "num_attention_heads": 8,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 2,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": vocab,
        },
        "max_dynamic_patch": MAX_TILES,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": SYSTEM,
        "template": "internlm2-chat",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 128,
            "image_size": SIDE,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": 512,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 4,
            "patch_size": 14,
            "qk_normalization": True,
            "qkv_bias": False,
            "torch_dtype": "bfloat16",
            "use_flash_attn": False,
        },
    }


def tiles_of(image: Image.Image) -> np.ndarray:
    """uint8 (tiles, SIDE, SIDE, 3): the grid's tiles, then the thumbnail when there are several."""
    return tile_image(image, tile_size=SIDE, max_tiles=MAX_TILES, thumbnail=True)


def normalise(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 (tiles, SIDE, SIDE, 3) -> float32 (tiles, 3, SIDE, SIDE)."""
    scaled = (tiles.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2).contiguous()


class Prompts:
    """Token ids of conversations about one image (`internlm2-chat`, image in the first turn)."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        ids, encode = self.tokenizer.special, self.tokenizer.encode
        self.start, self.end, self.context = (
            ids["<|im_start|>"],
            ids["<|im_end|>"],
            ids["<IMG_CONTEXT>"],
        )
        system = [1, self.start, *encode(f"system\n{SYSTEM}"), self.end]
        self.head = [
            *system,
            self.start,
            *encode("user\n"),
            ids["<img>"],
        ]  # ends before the image rows
        self._close = ids["</img>"]

    def question(self, text: str, first: bool) -> list[int]:
        """From the end of the image rows (first turn) or of the last answer up to the answer."""
        encode = self.tokenizer.encode
        opened = (
            [self._close, *encode("\n" + text)] if first else [self.start, *encode("user\n" + text)]
        )
        return [*opened, self.end, self.start, *encode("assistant\n")]

    def answer(self, text: str) -> list[int]:
        """The answer's ids and the stop token."""
        return [*self.tokenizer.encode(text), self.end]

    def tail(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Everything after the image rows: (ids, number of the answering turn or -1 per id)."""
        ids: list[int] = []
        owner: list[int] = []
        for number, (question, answer) in enumerate(turns):
            asked, said = self.question(question, number == 0), self.answer(answer)
            ids += asked + said
            owner += [-1] * len(asked) + [number] * len(said)
        return ids, owner


def image_rows(model: InternVLForConditionalGeneration, tiles: torch.Tensor) -> torch.Tensor:
    """uint8 (tiles, SIDE, SIDE, 3) -> (tiles, TILE_TOKENS, hidden)."""
    return model.model.get_image_features(normalise(tiles)).pooler_output


def sequence(
    model: InternVLForConditionalGeneration, head: list[int], rows: torch.Tensor, tail: torch.Tensor
) -> torch.Tensor:
    """Rows (batch, image rows, hidden), tail ids (batch, n) -> embeddings (batch, all, hidden)."""
    embed = model.get_input_embeddings()
    front = embed(torch.tensor(head)).expand(len(tail), -1, -1)
    back = embed(tail)
    return torch.cat([front.to(rows.dtype), rows, back.to(rows.dtype)], dim=1)
