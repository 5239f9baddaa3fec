"""Write a training checkpoint as an InternVL-Chat-V1-5 checkpoint directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from internvl_edge.examples.tiny_ocr.model import v15_config
from internvl_edge.examples.tiny_ocr.reference import hf_model, to_v15
from internvl_edge.examples.tiny_ocr.tokenizer import special_ids, write_tokenizer


def convert(source: Path, directory: Path) -> int:
    """Convert one file of train.py; returns the number of parameters."""
    config = v15_config()
    model = hf_model(config)
    model.load_state_dict(torch.load(source, weights_only=True)["model"])
    state = {name: tensor.to(torch.bfloat16) for name, tensor in to_v15(model).items()}
    write_tokenizer(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 1, "eos_token_id": special_ids()["<|im_end|>"], "pad_token_id": 2}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    return sum(tensor.numel() for tensor in state.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="last.pt of a training folder")
    parser.add_argument("directory", type=Path, help="checkpoint directory to write")
    args = parser.parse_args()
    print(f"{convert(args.source, args.directory)} parameters")


if __name__ == "__main__":
    main()
