"""One layer of every published decoder at its true width, beside transformers' own class.

    cd tests && python -m campaign.widths [--decoder NAME ...] [--folder DIR]

A checkpoint in the original layout is written with drawn bfloat16 weights, exported in float32, and
asked for the logits of a prompt and of tokens one by one. transformers computes the same in
float32 from the same weights. The tower is a small one, and the vocabulary is cut: neither changes
a decoder's layer. InternLM2, which transformers has not, is Llama with its rows split.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import BF16, drawn_tensors, small_config, write_checkpoint
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from internvl_edge.bench.scale.members import CONFIGS
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.checkpoint.config import describe_config
from internvl_edge.export.checkpoint.names import is_language, tensor_shapes
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.sequence import TokenSequence

#: Logits are sums of up to 29,568 float32 products of order one, added in another order.
TOLERANCE = 2e-4
PROMPT, STEPS, VOCABULARY = 40, 4, 1024
PREFIX = "language_model."
MODEL_TYPES = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
#: InternLM2's name of a module of a layer, and Llama's.
LLAMA = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
}


@dataclass(frozen=True)
class Decoder:
    """One layer of a decoder.

    Attributes:
        members: published checkpoints that have it.
        config: of a whole model with it, cut.
    """

    members: tuple[str, ...]
    config: dict[str, Any]

    @property
    def decoder(self) -> dict[str, Any]:
        """Its section of config.json."""
        return dict(self.config["llm_config"])

    @property
    def parameters(self) -> int:
        """Parameters of the decoder, the cut table and head included."""
        shapes = tensor_shapes(describe_config(self.config).spec).items()
        return sum(int(np.prod(shape)) for name, shape in shapes if is_language(name))


@dataclass(frozen=True)
class Agreement:
    """The largest logit, and the largest differences from transformers' over a prompt and over
    tokens one by one."""

    largest: float
    prompt: float
    steps: float

    @property
    def holds(self) -> bool:
        return max(self.prompt, self.steps) < TOLERANCE < self.largest


def decoders() -> list[Decoder]:
    """Return every decoder of a published size once: rotary kinds and vocabularies aside."""
    found: dict[tuple[object, ...], Decoder] = {}
    for name, config in CONFIGS.items():
        decoder = _cut(config["llm_config"])
        told = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        key = (decoder["architectures"][0], *(decoder[name] for name in told))
        earlier = found[key].members if key in found else ()
        found[key] = Decoder((*earlier, name), small_config(vision_layers=1))
        found[key].config["llm_config"] = decoder
    return list(found.values())


def compare(decoder: Decoder, folder: Path) -> Agreement:
    """Compare one decoder with transformers' class.

    Args:
        folder: an empty one; checkpoint and bundle take six bytes a parameter.
    """
    ids = np.random.default_rng(0).integers(3, 259, PROMPT + STEPS).tolist()
    checkpoint = write_checkpoint(folder / "checkpoint", decoder.config, shards=8)
    bundle = export_bundle(checkpoint, folder / "bundle")
    shutil.rmtree(checkpoint)
    whole, stepped = _own(bundle, ids)
    shutil.rmtree(bundle)
    expected = _reference(decoder, ids)
    return Agreement(
        float(np.abs(expected).max()),
        float(np.abs(whole - expected).max()),
        float(np.abs(stepped - expected[PROMPT:]).max()),
    )


def _own(bundle: Path, ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits `(tokens, vocab)` in one pass, and of the last tokens one by one."""
    model = InternVL.load(bundle, device="cpu", verify="size", reuse_bytes=0)
    engine = model.engine
    whole = engine.logits(TokenSequence.build(ids, model.context_id, []))
    cache = engine.backend.new_cache(len(ids))
    engine.prefill(cache, TokenSequence.build(ids[:PROMPT], model.context_id, []))
    stepped = [engine.decode(cache, token) for token in ids[PROMPT:]]
    return whole, np.stack(stepped)


def _reference(decoder: Decoder, ids: list[int]) -> NDArray[np.float32]:
    """transformers' logits; one tensor at a time is held beside the model."""
    told = decoder.decoder
    kind = MODEL_TYPES[told["architectures"][0]]
    if kind == "phi3":  # transformers 5 has the trained length beside the divisors
        length = {"original_max_position_embeddings": told["original_max_position_embeddings"]}
        told["rope_scaling"] = told["rope_scaling"] | {"type": "longrope"} | length
    config = AutoConfig.for_model(kind, **told)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    model = model.to_empty(device="cpu").eval()
    # Rotary tables are computed, not stored: those of an empty model are made anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    places = dict(model.named_parameters())
    filled: dict[str, int] = {}
    for stored, values in drawn_tensors(decoder.config, BF16):
        if stored.startswith(PREFIX):
            tensor = torch.from_numpy(values.astype(np.float32))
            for name, part in _places(stored[len(PREFIX) :], tensor, told):
                name, index = _stacked(name, told)
                target = places[name].data
                target = target[index] if index is not None else target
                assert target.shape == part.shape, name
                target.copy_(part)
                filled[name] = filled.get(name, 0) + part.numel()
    assert filled == {name: place.numel() for name, place in places.items()}
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def _places(
    name: str, tensor: torch.Tensor, told: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What transformers calls a stored tensor, or the parts of it."""
    if told["architectures"] != ["InternLM2ForCausalLM"]:
        yield name, tensor
    elif name.endswith("attention.wqkv.weight"):
        heads, groups = told["num_attention_heads"], told["num_key_value_heads"]
        each = heads // groups
        rows = tensor.reshape(groups, each + 2, -1, tensor.shape[1])
        parts = {"q": rows[:, :each], "k": rows[:, each], "v": rows[:, each + 1]}
        for letter, part in parts.items():
            place = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
            yield place, part.reshape(-1, tensor.shape[1])
    elif name == "output.weight":
        yield "lm_head.weight", tensor
    else:
        for ours, theirs in LLAMA.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        yield name, tensor


def _stacked(name: str, told: dict[str, Any]) -> tuple[str, Any]:
    """transformers holds experts in one tensor: its name, and the part that an expert's is."""
    before, inside, after = name.partition(".experts.")
    if not inside:
        return name, None
    expert, kind, _ = after.split(".")
    width = told["moe_intermediate_size"]
    if kind == "down_proj":
        return f"{before}.experts.down_proj", int(expert)
    rows = slice(0, width) if kind == "gate_proj" else slice(width, 2 * width)
    return f"{before}.experts.gate_up_proj", (int(expert), rows)


def _cut(decoder: dict[str, Any]) -> dict[str, Any]:
    """One layer, and a vocabulary that the tests' tokenizer fits."""
    told = copy.deepcopy(dict(decoder)) | {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
    if told["architectures"] == ["Phi3ForCausalLM"]:
        told["pad_token_id"] = 0
    return told


def main() -> int:
    """Compare, and print a line of the table for each; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--decoder", action="append", metavar="NAME", help="a member's; repeat")
    parser.add_argument("--folder", type=Path, help="where checkpoints and bundles lie meanwhile")
    arguments = parser.parse_args()
    wrong = 0
    for decoder in decoders():
        if arguments.decoder and not set(arguments.decoder) & set(decoder.members):
            continue
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            agreement = compare(decoder, Path(folder))
        wrong += not agreement.holds
        print(row(decoder, agreement), flush=True)
    return 1 if wrong else 0


def row(decoder: Decoder, agreement: Agreement) -> str:
    """A line of the table in docs/models.md."""
    told = decoder.decoder
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = [str(told[name]) for name in names]
    if "num_experts" in told:
        sizes[1] = f"{told['num_experts']} of {told['moe_intermediate_size']}"
    cells = (
        told["architectures"][0].removesuffix("ForCausalLM"),
        " / ".join(sizes),
        ", ".join(decoder.members),
        f"{decoder.parameters / 1e6:.0f} M",
        f"{agreement.largest:.2f}",
        f"{agreement.prompt:.1e}",
        f"{agreement.steps:.1e}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
