"""InternVL-Chat-V1-5 without its weights: the true shapes, values drawn on demand from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from internvl_edge.export.config import parse_config
from internvl_edge.export.mapping import expected_shapes
from internvl_edge.runtime.specs import ModelSpec

#: Values drawn at a time.
BLOCK_VALUES = 1 << 24


def internvl_1_5() -> ModelSpec:
    """InternViT-6B and InternLM2-20B as released: 934 tensors, 25.5 B parameters."""
    return parse_config(
        {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "force_image_size": 448,
            "dynamic_image_size": True,
            "max_dynamic_patch": 12,
            "use_thumbnail": True,
            "ps_version": "v2",
            "template": "internlm2-chat",
            "vision_config": {"num_hidden_layers": 45, "image_size": 448},
            "llm_config": {
                "architectures": ["InternLM2ForCausalLM"],
                "bias": False,
                "hidden_size": 6144,
                "intermediate_size": 16384,
                "max_position_embeddings": 32768,
                "num_attention_heads": 48,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_scaling": {"type": "dynamic", "factor": 3.0},
                "rope_theta": 1000000,
                "vocab_size": 92553,
            },
        }
    )


class SyntheticWeights:
    """A weight source: matrices normal by fan-in, norms around one, the same for the same seed."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec = spec
        self._seed = seed
        self._shapes = expected_shapes(spec)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def blocks(self, name: str) -> Iterator[NDArray[np.generic]]:
        shape = self._shapes[name]
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        width = int(np.prod(shape[1:]))
        step = max(1, BLOCK_VALUES // width)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            values = random.standard_normal((rows, *shape[1:]), np.float32)
            if len(shape) > 1:
                yield values * np.float32(width**-0.5)
            else:
                yield 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
