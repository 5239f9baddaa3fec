"""What others published for targets of ours, to hold the estimate against.

All are 4-bit weights in groups of 128 with a float16 head, batch 1. Power modes are unstated; the
fastest is taken. Lengths are unstated where 512 keys are assumed: a cache of that length is 1 % of
what is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from internvl_edge.bench.common.limits import Weights
from internvl_edge.bench.estimate.model import Device, Request, predict
from internvl_edge.bench.scale.members import internvl_1_5
from internvl_edge.bundle.contract import stored_name
from internvl_edge.bundle.specs import LanguageSpec, ModelSpec
from internvl_edge.export.calibration.decisions import QuantOptions, Recipe
from internvl_edge.export.checkpoint.names import HEAD
from internvl_edge.export.sizes import bundle_bytes
from internvl_edge.export.tensorrt.targets import get_target

ASSUMED_KEYS = 512

TINYCHAT = "https://github.com/mit-han-lab/llm-awq/blob/main/tinychat/README.md"
EDGE_LLM = "https://nvidia.github.io/TensorRT-Edge-LLM/0.9.1/user_guide/performance/performance-benchmarks.html"
EDGE_LLM_THOR = (
    "https://nvidia.github.io/TensorRT-Edge-LLM/user_guide/performance/performance-benchmarks.html"
)


@dataclass(frozen=True)
class Shape:
    """A LLaMA-like decoder."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def spec(self) -> ModelSpec:
        """In a model whose vision part is not looked at."""
        language = LanguageSpec(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            rms_norm_eps=1e-5,
            bias=False,
            max_position_embeddings=32768,
            rope_theta=1e6,
            rope_type="default",
            rope_factor=1.0,
        )
        other = internvl_1_5()
        return ModelSpec(other.vision, language, other.tiling, other.prompt)


LLAMA_3_8B = Shape(4096, 14336, 32, 32, 8, 128256)
LLAMA_2_7B = Shape(4096, 11008, 32, 32, 32, 32000)
LLAMA_2_13B = Shape(5120, 13824, 40, 40, 40, 32000)
QWEN3_8B = Shape(4096, 12288, 36, 32, 8, 151936)


@dataclass(frozen=True)
class Figure:
    """One published rate: of decoding behind `tokens` keys, or of a prefill of `tokens`."""

    model: str
    shape: Shape
    target: str
    phase: str
    tokens: int
    tokens_per_s: float
    source: str

    def predicted(self) -> float:
        """The estimate's rate."""
        spec = self.shape.spec()
        recipe = Recipe("fp16", "int4", "fp16", QuantOptions(keep_fp16=(stored_name(HEAD),)))
        weights = Weights(spec, bundle_bytes(spec, recipe), "fp16", "int4", "fp16")
        target = get_target(self.target)
        request = Request("fp16", "int4", "fp16", 0, self.tokens, self.tokens)
        device = Device.of_target(target, target.modes[0], request, None)
        speed = predict(weights, device, tiles=0, prompt_tokens=self.tokens)
        decode = self.phase == "decode"
        return speed.decode_tokens_per_s if decode else speed.prefill_tokens_per_s

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted() / self.tokens_per_s - 1


FIGURES = (
    Figure("Llama-3-8B", LLAMA_3_8B, "orin-agx-64", "decode", ASSUMED_KEYS, 30.7, TINYCHAT),
    Figure("Llama-2-7B", LLAMA_2_7B, "orin-agx-64", "decode", ASSUMED_KEYS, 31.1, TINYCHAT),
    Figure("Llama-2-13B", LLAMA_2_13B, "orin-agx-64", "decode", ASSUMED_KEYS, 17.2, TINYCHAT),
    Figure("VILA-13B", LLAMA_2_13B, "orin-agx-64", "decode", ASSUMED_KEYS, 17.5, TINYCHAT),
    Figure(
        "Llama-2-13B, later", LLAMA_2_13B, "orin-agx-64", "decode", ASSUMED_KEYS, 21.0, TINYCHAT
    ),
    Figure("Qwen3-8B", QWEN3_8B, "orin-agx-64", "decode", ASSUMED_KEYS, 32.5, EDGE_LLM),
    Figure("Llama-3-8B", LLAMA_3_8B, "rtx-4090", "decode", ASSUMED_KEYS, 150.2, TINYCHAT),
    Figure("Llama-2-13B", LLAMA_2_13B, "rtx-4090", "decode", ASSUMED_KEYS, 96.6, TINYCHAT),
    Figure("VILA1.5-13B", LLAMA_2_13B, "a100", "decode", ASSUMED_KEYS, 115.9, TINYCHAT),
    Figure("Llama-3.1-8B", LLAMA_3_8B, "thor", "decode", ASSUMED_KEYS, 50.8, EDGE_LLM_THOR),
    Figure("Llama-3-8B", LLAMA_3_8B, "orin-agx-64", "prefill", 1024, 1024 / 0.623, TINYCHAT),
    Figure("Llama-3-8B", LLAMA_3_8B, "orin-agx-64", "prefill", 4096, 4096 / 2.573, TINYCHAT),
    Figure("Qwen3-VL-8B", QWEN3_8B, "orin-agx-64", "prefill", 1024, 1299.0, EDGE_LLM),
)


@dataclass(frozen=True)
class Error:
    """Error of the estimate over some published figures: median and largest size."""

    count: int
    median: float
    worst: float


def published_error(phase: str, target: str | None = None) -> Error | None:
    """Over the figures of a phase, of one target where there are any; None without figures."""
    figures = [figure for figure in FIGURES if figure.phase == phase]
    figures = [figure for figure in figures if target in (None, figure.target)]
    sizes = [abs(figure.error) for figure in figures]
    return Error(len(sizes), median(sizes), max(sizes)) if sizes else None
