"""The vision tower through each system, behind one call: tiles in, rows of the projector out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from internvl_edge.bench.peers.mtmd import MtmdTower
from internvl_edge.bundle.contract import VISION_GRAPH
from internvl_edge.bundle.json_reader import read_json
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.export.checkpoint.checkpoint import WeightSource
from internvl_edge.export.checkpoint.layouts import NATIVE
from internvl_edge.export.checkpoint.weights import WeightReader
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime import InternVL

Tiles = NDArray[np.uint8]
ImageRows = NDArray[np.floating]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Tower(Protocol):
    """A loaded tower with its projector."""

    @property
    def features(self) -> str:
        """What of the CPU it uses, and what it chose by itself: in its own words."""

    def encode(self, tiles: Tiles) -> ImageRows:
        """uint8 `(tiles, S, S, 3)` -> `(tiles * tokens_per_tile, hidden)`."""


class OwnTower:
    """This runtime over a bundle."""

    def __init__(self, path: Path, threads: int) -> None:
        model = InternVL.load(path, device="cpu", threads=threads, verify="size", reuse_bytes=0)
        self._engine = model.engine

    @property
    def features(self) -> str:
        return f"{self._engine.backend.description}; {' '.join(cpu_features())}"

    def encode(self, tiles: Tiles) -> ImageRows:
        size = self._engine.tiles_at_once
        passes = [
            self._engine.encode_tiles(tiles[i : i + size]) for i in range(0, len(tiles), size)
        ]
        return np.concatenate(passes)


class OpenVinoTower:
    """OpenVINO over the graph of standard operators that a bundle for TensorRT has."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._model = openvino.Core().compile_model(path / VISION_GRAPH, "CPU", settings)

    @property
    def features(self) -> str:
        precision = self._model.get_property("INFERENCE_PRECISION_HINT")
        return f"INFERENCE_PRECISION_HINT {precision.to_string()}"

    def encode(self, tiles: Tiles) -> ImageRows:
        rows = np.asarray(self._model([tiles])[0])
        return rows.reshape(-1, rows.shape[-1])


class TransformersTower:
    """transformers' InternVLModel in bfloat16; see `write_tower`."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import InternVLConfig, InternVLModel

        torch.set_num_threads(threads)
        self._torch = torch
        config = InternVLConfig(**read_json(path / CONFIG))
        kind: Any = InternVLModel  # its methods carry no types
        with torch.device("meta"):
            model = kind(config)
        del model.language_model
        model.load_state_dict(load_file(path / WEIGHTS), assign=True)
        self._model = model.eval()
        # ImageNet's, as every member of the family has them.
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor([0.485, 0.456, 0.406]).reshape(shape)
        self._deviation = torch.tensor([0.229, 0.224, 0.225]).reshape(shape)

    @property
    def features(self) -> str:
        return f"bfloat16, {self._torch.backends.cpu.get_cpu_capability()}"

    def encode(self, tiles: Tiles) -> ImageRows:
        torch = self._torch
        pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
        pixels = ((pixels - self._mean) / self._deviation).to(torch.bfloat16)
        with torch.inference_mode():
            found = self._model.get_image_features(pixel_values=pixels)
        rows = getattr(found, "pooler_output", found)
        return np.asarray(rows.reshape(-1, rows.shape[-1]).float().numpy())


def write_tower(source: WeightSource, directory: Path) -> Path:
    """Write the tower and the projector for transformers: config.json and bfloat16 weights.

    Args:
        directory: to create.
    """
    directory.mkdir()
    config = json.dumps(tower_config(source.spec), indent=2)
    (directory / CONFIG).write_text(config, encoding="utf-8")
    layout = NATIVE.older
    assert layout is not None
    reader = WeightReader(source, "float32")
    tensors = {}
    for name, origin in layout.vision(source.spec).items():
        values = np.concatenate(list(reader.tensor(name).cast_blocks()))
        start = 0
        for part in origin.parts:
            stop = len(values) if part.stop is None else start + part.stop - part.start
            tensors[part.name] = values[start:stop].astype(ml_dtypes.bfloat16)
            start = stop
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def tower_config(spec: ModelSpec) -> dict[str, Any]:
    """Return what transformers' InternVLConfig is made of: its decoder is as wide as the model's,
    and empty."""
    vision = spec.vision
    side = [vision.tile_size] * 2
    return {
        "vision_config": {
            "attention_bias": vision.qkv_bias,
            "hidden_size": vision.hidden_size,
            "image_size": side,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": [vision.patch_size] * 2,
            "use_mean_pooling": True,  # no norm behind the last layer
            "use_qk_norm": vision.qk_normalization,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": spec.language.hidden_size,
            "num_hidden_layers": 0,
            "vocab_size": 1,
        },
        "downsample_ratio": 0.5,
    }


#: By the name a worker is asked for: made of a path and threads.
TOWERS: dict[str, Callable[[Path, int], Tower]] = {
    "internvl-edge tower": OwnTower,
    "openvino tower": OpenVinoTower,
    "llama.cpp tower": MtmdTower,
    "transformers tower": TransformersTower,
}
