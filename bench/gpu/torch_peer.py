"""transformers in bfloat16 beside the engines: what a user without them would run.

Random weights made on the device, in the shapes of the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from internvl_edge.bench.gpu.model import median_seconds
from internvl_edge.bundle.specs import ModelSpec


def product_rates(side: int) -> dict[str, float]:
    """Operations a second of a square matrix product, by type; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    rates = {}
    half = torch.randn(side, side, device="cuda", dtype=torch.float16)
    whole = torch.randint(-127, 127, (side, side), device="cuda", dtype=torch.int8)
    products: dict[str, Callable[[], Any]] = {
        "fp16": lambda: half @ half,
        "int8": lambda: torch._int_mm(whole, whole.t()),
    }
    for name, product in products.items():
        rates[name] = 2 * side**3 / median_seconds(_waiting(product, "cuda"), 20)
    return rates


def time_vision(spec: ModelSpec, device: str, repeat: int) -> list[dict[str, Any]]:
    """The tower over one and four tiles, eager and compiled."""
    vision = spec.vision
    config = InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.layers_run,
        num_attention_heads=vision.num_attention_heads,
        image_size=[vision.tile_size] * 2,
        patch_size=[vision.patch_size] * 2,
        use_qk_norm=vision.qk_normalization,
        norm_type="rms_norm" if vision.norm_type == "rms_norm" else "layer_norm",
    )
    model = _made(lambda: InternVLVisionModel(config), device)
    rows = []
    for kind, forward in (("eager", model.forward), ("compiled", torch.compile(model.forward))):
        for tiles in (1, 4):
            shape = (tiles, 3, vision.tile_size, vision.tile_size)
            pixels = torch.randn(shape, device=device, dtype=torch.bfloat16)

            def run(forward: Any = forward, pixels: Any = pixels) -> Any:
                return forward(pixel_values=pixels)

            seconds = median_seconds(_waiting(run, device), repeat)
            rows.append({"name": f"torch {kind} vision, {tiles} tiles", "seconds": seconds})
    return rows


def time_decoder(
    spec: ModelSpec, device: str, repeat: int, *, prompt: int, context: int
) -> list[dict[str, Any]]:
    """Prefill and one step behind it over a static cache, eager and compiled."""
    language = spec.language
    config = LlamaConfig(
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.num_hidden_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_key_value_heads,
        vocab_size=language.vocab_size,
        max_position_embeddings=context,
    )
    model = _made(lambda: LlamaForCausalLM(config), device)
    cache: Any = StaticCache(config=config, max_cache_len=context)
    rows = []

    def passing(forward: Any, tokens: int, start: int) -> Callable[[], Any]:
        ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
        positions = torch.arange(start, start + tokens, device=device)[None]

        def run() -> Any:
            cache.reset()
            return forward(
                input_ids=ids,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )

        return run

    seconds = median_seconds(_waiting(passing(model.forward, prompt, 0), device), 3, warmup=1)
    rows.append({"name": f"torch eager prefill {prompt}", "seconds": seconds})
    for kind, forward in (
        ("eager", model.forward),
        ("compiled", torch.compile(model.forward, mode="reduce-overhead")),
    ):
        seconds = median_seconds(_waiting(passing(forward, 1, prompt), device), repeat, warmup=4)
        rows.append({"name": f"torch {kind} decode", "seconds": seconds})
    return rows


def _made(make: Callable[[], Any], device: str) -> Any:
    """A module with weights of bfloat16, made where it will run."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def _waiting(run: Callable[[], Any], device: str) -> Callable[[], None]:
    def waited() -> None:
        with torch.no_grad():
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    return waited
