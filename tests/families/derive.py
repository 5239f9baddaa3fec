"""Make a fixture folder of another decoder from one in transformers' own layout.

    python tests/families/derive.py hf_llama hf_mistral '{"model_type": "mistral"}'

The picture, the prompts, the tokenizer and the vision tower stay; the decoder gets the told keys in
the place of the old family's, weights drawn anew, and what transformers computes with them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer, InternVLForConditionalGeneration

FAMILIES = Path(__file__).parent
#: Of the old decoder's config what any family reads.
SHARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"),
)
DECODER = "model.language_model."
#: The smallest gap of the two greatest logits at which greedy ids are the weights', not rounding's.
LEAST_GAP = 0.05
#: What was measured of the old decoder.
MEASURED = ("zeroed_pixels_move_logits_by_std",)
MEASURED_TOLERANCES = ("float64_minus_float32_logits", "logits_if_pillow_kernel_is_used")
Arrays = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a fixture folder of another decoder.")
    parser.add_argument("source", help="a folder here in transformers' own layout")
    parser.add_argument("name", help="the folder to make")
    parser.add_argument("decoder", type=json.loads, help="the family's keys of text_config, JSON")
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    derive(told.source, told.name, told.decoder, told.seed)


def derive(source: str, name: str, decoder: dict[str, Any], seed: int) -> None:
    """Copy the folder `source` to `name` with another decoder."""
    old, new = FAMILIES / source, FAMILIES / name
    torch.set_num_threads(1)
    model = draw(old / "model", decoder, seed)
    meta = json.loads((old / "meta.json").read_text("utf-8"))
    with np.load(old / "expected.npz") as data:
        arrays = dict(data)
    compute(model, meta, arrays)
    tokenizer = AutoTokenizer.from_pretrained(old / "model")
    for case, told in meta["cases"].items():
        told["answer"] = tokenizer.decode(arrays[_name(case, "greedy_ids")])
    shutil.copytree(old, new)
    model.to(torch.bfloat16).save_pretrained(new / "model")
    # Told anew by transformers, without the token that ends an answer.
    shutil.copy(old / "model" / "generation_config.json", new / "model")
    np.savez_compressed(new / "expected.npz", **arrays)
    meta = {key: value for key, value in meta.items() if key not in MEASURED}
    for key in MEASURED_TOLERANCES:
        meta["tolerances"].pop(key, None)
    meta |= {"name": name, "decoder": decoder["model_type"], "seed": seed}
    meta["versions"] |= {one: version(one) for one in ("torch", "transformers", "numpy")}
    text = json.dumps(meta, ensure_ascii=False, indent=2)
    (new / "meta.json").write_text(f"{text}\n", "utf-8")


def draw(old: Path, decoder: dict[str, Any], seed: int) -> Any:
    """Return a float32 model whose weights bfloat16 holds."""
    config = json.loads((old / "config.json").read_text("utf-8"))
    text = config["text_config"]
    config["text_config"] = {key: text[key] for key in SHARED if key in text} | decoder
    told = AutoConfig.for_model(config.pop("model_type"), **config)
    # Two steps: the old decoder's tensors would not fit, and the tower's names are of many ages.
    source = InternVLForConditionalGeneration.from_pretrained(old, dtype=torch.float32)
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration._from_config(told, attn_implementation="eager")
    kept = source.state_dict()
    with torch.no_grad():
        for name, values in model.named_parameters():
            drawn = name.startswith((DECODER, "lm_head."))
            values.copy_(_drawn(name, values) if drawn else kept[name])
            values.copy_(values.to(torch.bfloat16))
    return model.float().eval()


def _drawn(name: str, values: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(values.shape)
    if values.dim() == 1:
        return 0.1 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
    return noise * (1.0 if "embed_tokens" in name else 2.0 / values.shape[-1] ** 0.5)


def compute(model: Any, meta: dict[str, Any], arrays: Arrays) -> None:
    """Replace what depends on the decoder.

    Raises:
        SystemExit: rounding could change a greedy id, or an answer ends early: take another seed.
    """
    pixels = torch.from_numpy(arrays["pixel_values"])
    for case, told in meta["cases"].items():
        ids = torch.from_numpy(arrays[_name(case, "input_ids")])[None]
        steps = len(arrays[_name(case, "greedy_ids")])
        extra = {"pixel_values": pixels} if case == "main" else {}
        rows, greedy = [], []
        with torch.inference_mode():
            for _ in range(steps):
                rows.append(model(input_ids=ids, **extra).logits[0, -1].numpy())
                greedy.append(int(rows[-1].argmax()))
                ids = torch.cat([ids, torch.tensor([greedy[-1:]])], dim=1)
        top = np.sort(np.array(rows), axis=1)[:, -2:]
        told["min_top2_gap"] = round(float((top[:, 1] - top[:, 0]).min()), 4)
        if told["min_top2_gap"] < LEAST_GAP or set(greedy) & set(meta["stop_ids"]):
            raise SystemExit(f"case {case}: gap {told['min_top2_gap']}, ids {greedy}: pass --seed")
        arrays[_name(case, "greedy_ids")] = np.array(greedy)
        arrays[_name(case, "first_logits")] = rows[0]
        if case == "main":
            arrays["step_logits"] = np.array(rows)


def _name(case: str, array: str) -> str:
    return array if case == "main" else f"{case}_{array}"


if __name__ == "__main__":
    main()
