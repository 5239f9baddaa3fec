"""transformers' InternVL with a checkpoint's weights, and the input it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration
from transformers.initialization import no_init_weights

from internvl_edge.examples.tiny_ocr.reference import hf_model, load_v15


def load_reference(checkpoint: Path, config: dict[str, Any]) -> InternVLForConditionalGeneration:
    """A float32 model holding the weights of all shards."""
    with no_init_weights():
        model = hf_model(config)
    state: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        state |= load_file(shard)
    load_v15(model, state)
    return model


def reference_pixels(tiles: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 `(tiles, S, S, 3)` -> float32 `(tiles, 3, S, S)`: ImageNet mean and deviation."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(tiles.copy()) / 255 - mean) / std).permute(0, 3, 1, 2)


def reference_rows(
    model: InternVLForConditionalGeneration, tiles: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Projected image embeddings `(tiles * tokens_per_tile, hidden)`."""
    with torch.no_grad():
        features = model.get_image_features(pixel_values=reference_pixels(tiles))
    features = getattr(features, "pooler_output", features)
    return np.asarray(features.reshape(-1, model.config.text_config.hidden_size).numpy())


def reference_logits(
    model: InternVLForConditionalGeneration, ids: list[int], tiles: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Logits of every position `(tokens, vocab)`."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), pixel_values=reference_pixels(tiles))
    return np.asarray(output.logits[0].numpy())
